// How the rows of a program are cut into work of even size for threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "core/program.hpp"
#include "core/sum_shape.hpp"

namespace adamax::cpu {

// Elements that a thread takes at a time: large enough that taking is free, small enough to even
// out threads of unequal speed. A multiple of kBlock.
constexpr std::int64_t kChunk = 16 * kBlock;

struct Piece {
  std::size_t row;
  std::int64_t begin, end;
};

// Pieces of rows in order, grouped into chunks of about kChunk elements: large rows are cut, small
// ones share a chunk. The cuts do not depend on the number of threads.
class Work {
 public:
  explicit Work(std::span<const Row> rows) {
    std::int64_t in_chunk = 0;
    pieces_.reserve(rows.size());
    chunk_starts_.reserve(8);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      for (std::int64_t begin = 0; begin < rows[i].size; begin += kChunk) {
        const std::int64_t end = std::min(begin + kChunk, rows[i].size);
        if (in_chunk == 0) chunk_starts_.push_back(pieces_.size());
        pieces_.push_back({i, begin, end});
        in_chunk += end - begin;
        if (in_chunk >= kChunk) in_chunk = 0;
      }
    }
    chunk_starts_.push_back(pieces_.size());
  }

  std::int64_t chunks() const { return static_cast<std::int64_t>(chunk_starts_.size()) - 1; }
  std::span<const Piece> chunk(std::int64_t i) const {
    return std::span(pieces_).subspan(chunk_starts_[i], chunk_starts_[i + 1] - chunk_starts_[i]);
  }

 private:
  std::vector<Piece> pieces_;
  std::vector<std::size_t> chunk_starts_;
};

}  // namespace adamax::cpu
