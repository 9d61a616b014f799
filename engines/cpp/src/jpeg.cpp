// JPEG through libjpeg, with the settings that Pillow leaves as they are.
#include <cstdio>  // jpeglib.h needs its types

#include <jpeglib.h>
#include <jerror.h>

#include <cstring>

#include "decode.hpp"

namespace cascade_rt::detail {

namespace {

[[noreturn]] void fail(j_common_ptr info) {
  char message[JMSG_LENGTH_MAX];
  (*info->err->format_message)(info, message);
  throw Unreadable(message);
}

void warned(j_common_ptr info, int level) {
  if (level < 0 && info->err->msg_code == JWRN_JPEG_EOF) fail(info);  // Pillow refuses files that are cut too
}

struct Work {
  jpeg_decompress_struct info{};
  jpeg_error_mgr errors{};
  std::string exif, xmp;

  Work() = default;
  Work(const Work&) = delete;
  Work& operator=(const Work&) = delete;
  ~Work() { jpeg_destroy_decompress(&info); }
};

void keep_markers(Work& work) {
  const std::string exif("Exif\0\0", 6), xmp("http://ns.adobe.com/xap/1.0/\0", 29);
  for (auto* marker = work.info.marker_list; marker != nullptr; marker = marker->next) {
    const std::string data(reinterpret_cast<const char*>(marker->data), marker->data_length);
    if (data.rfind(exif, 0) == 0) {
      work.exif += work.exif.empty() ? data : data.substr(exif.size());
    } else if (data.rfind(xmp, 0) == 0) {
      work.xmp = data.substr(xmp.size());
    }
  }
}

}  // namespace

Decoded decode_jpeg(const std::string& bytes) {
  Work work;
  work.info.err = jpeg_std_error(&work.errors);
  work.errors.error_exit = fail;
  work.errors.emit_message = warned;
  jpeg_create_decompress(&work.info);
  jpeg_mem_src(&work.info, reinterpret_cast<const unsigned char*>(bytes.data()), static_cast<unsigned long>(bytes.size()));
  jpeg_save_markers(&work.info, JPEG_APP0 + 1, 0xFFFF);
  jpeg_read_header(&work.info, TRUE);
  const std::size_t channels = static_cast<std::size_t>(work.info.num_components);
  if (channels != 1 && channels != 3) throw Unreadable("it has CMYK colours; save it in RGB");
  Decoded made;
  made.width = work.info.image_width;
  made.height = work.info.image_height;
  check_pixel_count(made.width, made.height);
  keep_markers(work);
  work.info.out_color_space = channels == 1 ? JCS_GRAYSCALE : JCS_RGB;
  jpeg_start_decompress(&work.info);
  made.rgba.resize(made.width * made.height * 4);
  std::vector<std::uint8_t> row(made.width * channels);
  for (std::size_t y = 0; y < made.height; ++y) {
    JSAMPROW samples = row.data();
    jpeg_read_scanlines(&work.info, &samples, 1);
    for (std::size_t x = 0; x < made.width; ++x) {
      std::uint8_t* out = made.rgba.data() + (y * made.width + x) * 4;
      for (std::size_t c = 0; c < 3; ++c) out[c] = row[x * channels + (channels == 1 ? 0 : c)];
      out[3] = 255;
    }
  }
  jpeg_finish_decompress(&work.info);
  made.orientation = exif_orientation(work.exif);
  if (made.orientation == 0) made.orientation = xmp_orientation(work.xmp);
  return made;
}

}  // namespace cascade_rt::detail
