// LoRA files: what they say, and what they do to weights; the weights of a bundle with them applied, beside the bundle.
#pragma once
#include <set>

#include "bundle.hpp"
#include "request.hpp"
#include "tensor_file.hpp"

namespace cascade_rt::detail {

/// One low-rank product of a file; see cascade_rt/lora.py.
struct LoraPair {
  std::string component, target;  // the network, and the module's name in the file
  std::string down, up;           // keys of [rank, in, ...] and [out, rank, ...]
  std::optional<double> alpha;    // the rank where there is none
  std::optional<std::string> magnitude;  // key of the lengths of the changed weight's rows (DoRA)
};

/// A pair on its way to one weight: all of its rows, or one of `count` equal parts of them.
struct LoraUpdate {
  const LoraPair* pair;
  std::size_t index, count;
};

/// The tensors of a network that a file changes, in order, and how.
using LoraUpdates = std::vector<std::pair<std::string, std::vector<LoraUpdate>>>;

class Lora {
 public:
  /// Open a file. Throws CheckpointError.
  Lora(const std::string& path, double scale);

  const std::string& path() const { return tensors_.path(); }
  double scale() const { return scale_; }
  /// The networks that it changes.
  std::vector<std::string> components() const;
  bool changes(const std::string& component) const;
  /// What the file does to the weights of a network. Throws CheckpointError where it does not fit.
  LoraUpdates updates(const std::string& component, const TensorFile& weights) const;
  /// A weight, [out, in, ...], with what the file does to it. Throws CheckpointError where that is not finite.
  std::vector<float> applied(const LoraUpdate& update, std::vector<float> weight, const Shape& shape) const;

 private:
  CheckpointError error(const std::string& what) const;
  void read_pairs();
  void place(const std::string& key, std::string& component, std::string& target, std::string& kind) const;
  std::map<std::string, double> peft_alphas() const;
  void check_rank(const LoraPair& pair) const;
  void check(const LoraPair& pair, const std::string& name, const Shape& shape, std::size_t parts) const;
  std::size_t position(const LoraPair& pair) const;

  TensorFile tensors_;
  double scale_;
  std::vector<LoraPair> pairs_;
};

/// What tells one set of LoRA files from another.
std::string label_of(const std::vector<Lora>& loras);

/// Write the changed weights files, and the graphs that point into them, into an empty folder; returns the names of the
/// weights files. Throws CheckpointError, EngineError, OutputError.
std::set<std::string> write_overlay(const Bundle& bundle, const Records& engines, const std::vector<Lora>& loras,
                                    const std::string& folder);

}  // namespace cascade_rt::detail
