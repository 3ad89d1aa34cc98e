// float32 copies of the rows of some heads, where the kernels cannot read the input as it is.
#pragma once

#include "call.h"

namespace sparse_attn {

// float32 rows are read in place only where they lie one after the other. A view of (B, L, H, D) memory
// puts them on a page each, and the kernels then run at half their speed (2 KiB stride, EPYC 7003).
constexpr int64_t kMaxGap = 16;  // elements between rows

class PackedHeads {
 public:
  // `max_heads`: heads held at once.
  PackedHeads(const Heads& source, int64_t max_heads) : source_(source) {
    if (!wanted(source)) return;
    stride_ = round_up(source.width);
    buffer_ = std::make_unique<Buffer>(max_heads * source.length * stride_);
  }

  static bool wanted(const Heads& source) {
    return source.dtype != DType::kFloat32 || source.stride_row > source.width + kMaxGap ||
           source.stride_row < source.width;
  }

  // Bytes that one head takes.
  static int64_t head_bytes(const Heads& source) {
    return wanted(source) ? 4 * source.length * (round_up(source.width)) : 0;
  }

  bool packs() const { return buffer_ != nullptr; }

  // The rows of head (b, h), which is number `slot` of those held.
  Rows rows(int64_t b, int64_t h, int64_t slot) const {
    if (!packs()) return {reinterpret_cast<const float*>(source_.head(b, h)), source_.stride_row};
    return {at(slot), stride_};
  }

  void pack(const Kernels& kernels, int64_t b, int64_t h, int64_t slot, int64_t first, int64_t count) const {
    if (packs()) kernels.pack(source_.raw(b, h), first, count, source_.width, at(slot), stride_);
  }

 private:
  float* at(int64_t slot) const { return buffer_->data() + slot * source_.length * stride_; }

  Heads source_;
  int64_t stride_ = 0;
  std::unique_ptr<Buffer> buffer_;
};

// How many key heads are worked on at once: as many as a last-level cache holds packed, since every round
// of heads ends with threads that wait for the last one; at least enough rows to keep every thread busy;
// within a bound on the memory.
inline int64_t heads_at_once(int64_t num_heads, int64_t tasks_per_head, int64_t bytes_per_head,
                             int64_t num_threads) {
  constexpr int64_t kTasksPerThread = 64, kCacheBytes = int64_t{16} << 20, kMaxBytes = int64_t{256} << 20;
  if (bytes_per_head == 0) return num_heads;
  int64_t busy = ceil_div(kTasksPerThread * num_threads, tasks_per_head);
  int64_t wanted = std::max(busy, kCacheBytes / bytes_per_head);
  return std::clamp<int64_t>(std::min(wanted, kMaxBytes / bytes_per_head), 1, num_heads);
}

}  // namespace sparse_attn
