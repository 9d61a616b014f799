// JPEG through libjpeg, with the settings that Pillow leaves as they are.
#include <cstdio>  // jpeglib.h needs its types

#include <jpeglib.h>
#include <jerror.h>

#include <csetjmp>
#include <cstring>

#include "decode.hpp"

namespace cascade_rt::detail {

namespace {

/// An error jumps out of libjpeg: it is C, and exceptions must not cross it.
struct Errors {
  jpeg_error_mgr base;
  std::jmp_buf out;
  char message[JMSG_LENGTH_MAX];
};

Errors* errors_of(j_common_ptr info) { return reinterpret_cast<Errors*>(info->err); }

[[noreturn]] void leave(j_common_ptr info) {
  (*info->err->format_message)(info, errors_of(info)->message);
  std::longjmp(errors_of(info)->out, 1);
}

void warned(j_common_ptr info, int level) {
  if (level < 0 && info->err->msg_code == JWRN_JPEG_EOF) leave(info);  // Pillow refuses files that are cut too
}

enum class State { fine, unreadable, colours, pixels };

/// What `decode` fills in step by step; outside the function that libjpeg jumps back into.
struct Work {
  jpeg_decompress_struct info{};
  Errors errors{};
  std::vector<std::uint8_t> samples;
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

State decode_into(Work& work, const std::string& bytes) {
  work.info.err = jpeg_std_error(&work.errors.base);
  work.errors.base.error_exit = leave;
  work.errors.base.emit_message = warned;
  if (setjmp(work.errors.out) != 0) return State::unreadable;
  jpeg_create_decompress(&work.info);
  jpeg_mem_src(&work.info, reinterpret_cast<const unsigned char*>(bytes.data()), static_cast<unsigned long>(bytes.size()));
  jpeg_save_markers(&work.info, JPEG_APP0 + 1, 0xFFFF);
  jpeg_read_header(&work.info, TRUE);
  if (work.info.num_components != 1 && work.info.num_components != 3) return State::colours;
  try {
    check_pixel_count(work.info.image_width, work.info.image_height);
  } catch (const TooManyPixels&) {
    return State::pixels;
  }
  keep_markers(work);
  work.info.out_color_space = work.info.num_components == 1 ? JCS_GRAYSCALE : JCS_RGB;
  jpeg_start_decompress(&work.info);
  const std::size_t row = std::size_t{work.info.output_width} * static_cast<std::size_t>(work.info.output_components);
  work.samples.resize(row * work.info.output_height);
  while (work.info.output_scanline < work.info.output_height) {
    JSAMPROW out = work.samples.data() + row * work.info.output_scanline;
    jpeg_read_scanlines(&work.info, &out, 1);
  }
  jpeg_finish_decompress(&work.info);
  return State::fine;
}

}  // namespace

Decoded decode_jpeg(const std::string& bytes) {
  Work work;
  const State state = decode_into(work, bytes);
  Decoded made;
  made.width = work.info.image_width;
  made.height = work.info.image_height;
  const std::size_t channels = static_cast<std::size_t>(work.info.output_components);
  if (state == State::unreadable) throw Unreadable(work.errors.message);
  if (state == State::colours) throw Unreadable("it has CMYK colours; save it in RGB");
  if (state == State::pixels) throw TooManyPixels(made.width, made.height);
  made.rgba.resize(made.width * made.height * 4);
  for (std::size_t i = 0; i < made.width * made.height; ++i) {
    for (std::size_t c = 0; c < 3; ++c) made.rgba[i * 4 + c] = work.samples[i * channels + (channels == 1 ? 0 : c)];
    made.rgba[i * 4 + 3] = 255;
  }
  made.orientation = exif_orientation(work.exif);
  if (made.orientation == 0) made.orientation = xmp_orientation(work.xmp);
  return made;
}

}  // namespace cascade_rt::detail
