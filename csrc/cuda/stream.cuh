// Rows of tensors as operands: those that a warp owns, straight from device memory, and those that it streams through
// its stages in shared memory.
#pragma once

#include "operands.cuh"
#include "params.h"

namespace reattn {

// Which rows a block owns, of which sample, and which columns of the output; and which of its warps this is.
struct Place {
  int sample, first_row, first_dim, warp;

  REATTN_DEVICE Place(const Params& p, int columns)
      : sample(block_x() / p.plan.blocks),
        first_row(block_x() % p.plan.blocks * p.plan.own),
        first_dim(block_y() * columns),
        warp(reattn::warp()) {}
};

template <class T>
REATTN_DEVICE T* head_rows(const Tensor& tensor, int sample, int head) {
  return static_cast<T*>(tensor.data) + (sample * tensor.batch_stride + head * tensor.head_stride);
}

REATTN_DEVICE Shared<char> at(int offset) { return shared_memory() + offset; }

// Some rows of one head, 16 at a time, head_dim cut in pieces that fit a stage: piece after piece, then the next rows.
// Where there are two stages, a warp works on one while the other is on its way.
template <class T>
class Stream {
 public:
  // Rows first_row, ... of a tile; columns first_dim to last_dim - 1.
  REATTN_DEVICE Stream(const Params& p, const Tensor& tensor, const Place& place, int head, int first_row, int rows,
                       int first_dim, int last_dim)
      : p_(p),
        tensor_(tensor),
        row_(first_row),
        end_(first_row + rows),
        dim_(first_dim),
        first_dim_(first_dim),
        last_dim_(last_dim),
        stages_(at(p.plan.staged + place.warp * p.plan.stages * 16 * p.plan.stage_stride)) {
    const int bytes = (last_dim - first_dim) * int(sizeof(T));
    log2_lanes_ = bytes > 64 ? 3 : bytes > 32 ? 2 : 1;  // that copy a row
    from_ = head_rows<T>(tensor, place.sample, head);
#pragma unroll 1
    for (int stage = 0; stage < p.plan.stages; stage++) fetch();
  }

  // The next 16 rows of a piece; the warp gives them back by release.
  REATTN_DEVICE Rows<T> next() {
    if (p_.plan.stages == 2)
      copies_arrived<1>();
    else
      copies_arrived<0>();
    sync_warp();
    return rows_at<T>(stages_ + turn_ * 16 * p_.plan.stage_stride, p_.plan.stage_stride);
  }
  REATTN_DEVICE void release() {
    sync_warp();
    fetch();
  }

 private:
  // Into the stage that was released last.
  REATTN_DEVICE void fetch() {
    if (row_ < end_) {
      const int byte = (lane() & ((1 << log2_lanes_) - 1)) * 16, dim = dim_ + byte / int(sizeof(T));
      if (dim < last_dim_) {
        if (log2_lanes_ == 3)
          copy<4>(byte, dim);
        else if (log2_lanes_ == 2)
          copy<8>(byte, dim);
        else
          copy<16>(byte, dim);
      }
      dim_ += kPieceDims<T>;
      if (dim_ >= last_dim_) {
        dim_ = first_dim_;
        row_ += 16;
      }
    }
    turn_ = p_.plan.stages == 2 ? 1 - turn_ : 0;
    close_copies();
  }

  template <int kRowsAtOnce>
  REATTN_DEVICE void copy(int byte, int dim) const {
    const int first = lane() >> log2_lanes_;
    const T* from = from_ + ((row_ + first) * tensor_.row_stride + dim);
    Shared<char> to = stages_ + ((turn_ * 16 + first) * p_.plan.stage_stride + byte);
    const int rows = dim < p_.depth ? tensor_.rows - row_ - first : 0;
#pragma unroll
    for (int row = 0; row < 16; row += kRowsAtOnce) {
      copy_async(to, from, row < rows);
      from += kRowsAtOnce * tensor_.row_stride;
      to = to + kRowsAtOnce * p_.plan.stage_stride;
    }
  }

  const Params& p_;
  const Tensor& tensor_;
  int row_, end_, dim_, first_dim_, last_dim_;
  Shared<char> stages_;
  int log2_lanes_, turn_ = 0;
  const T* from_;
};

// 16 x kTiles rows of one head, as operand a. Several tiles are for a head_dim of one piece.
template <class T, int kTiles>
class OwnRows {
  using A = typename Operand<T>::A;
  static constexpr int kSteps = kPieceDims<T> / Operand<T>::kDepth;

 public:
  REATTN_DEVICE OwnRows(const Params& p, const Tensor& tensor, const Place& place, int head)
      : tensor_(tensor),
        from_(head_rows<T>(tensor, place.sample, head)),
        first_row_(recomputed(place.first_row)),
        depth_(p.depth),
        pieces_(kTiles > 1 ? 1 : (p.depth + kPieceDims<T> - 1) / kPieceDims<T>) {
    hold(0);
  }

  // 16 columns of products, from 8 column on, += these rows times the next 16 of the stream, over all of head_dim.
  template <int kColumns>
  REATTN_DEVICE void multiply(float (&products)[kTiles][kColumns][4], int column, Stream<T>& stream) {
    for (int piece = 0; piece < pieces_; piece++) {
      if (kTiles == 1 && pieces_ > 1) hold(piece);
      const Rows<T> stage = stream.next();
#pragma unroll
      for (int step = 0; step < kSteps; step++)
        if (piece * kPieceDims<T> + step * Operand<T>::kDepth < depth_) {
          const auto b = Operand<T>::b(stage, 0, step * Operand<T>::kDepth);
#pragma unroll
          for (int tile = 0; tile < kTiles; tile++) {
            const A a = Operand<T>::kHeld ? held_[tile][step % kHeldSteps] : operand(tile, step, piece);
            Operand<T>::multiply(products[tile][column], products[tile][column + 1], a, b);
          }
        }
      stream.release();
    }
  }

 private:
  static constexpr int kHeldSteps = Operand<T>::kHeld ? kSteps : 1;

  REATTN_DEVICE A operand(int tile, int step, int piece) const {
    const int row = first_row_ + 16 * tile + lane() / 4;
    const T* upper = row < tensor_.rows ? from_ + row * tensor_.row_stride : nullptr;
    const T* lower = row + 8 < tensor_.rows ? from_ + (row + 8) * tensor_.row_stride : nullptr;
    return Operand<T>::a_from_device(upper, lower, piece * kPieceDims<T> + step * Operand<T>::kDepth, depth_);
  }
  REATTN_DEVICE void hold(int piece) {
    if constexpr (Operand<T>::kHeld)
#pragma unroll
      for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
        for (int step = 0; step < kSteps; step++) held_[tile][step] = operand(tile, step, piece);
  }

  const Tensor& tensor_;
  const T* from_;
  int first_row_, depth_, pieces_;
  A held_[kTiles][kHeldSteps];
};

// sums (16 x kTiles rows, up to 8 kColumns columns) += a tile of maps of one head times the rows of a stream over the
// same 16-row groups, whose pieces are the columns.
template <class T, int kTiles, int kColumns>
REATTN_DEVICE void multiply_maps(float (&sums)[kTiles][kColumns][4], const Rows<T>& maps, int streamed_rows,
                                 Stream<T>& stream, int dims) {
  constexpr int kPieceColumns = kPieceDims<T> / 8 < kColumns ? kPieceDims<T> / 8 : kColumns;
#pragma unroll 1
  for (int group = 0; group < streamed_rows; group += 16) {
#pragma unroll
    for (int first = 0; first < kColumns; first += kPieceColumns)
      if (first * 8 < dims) {
        const Rows<T> stage = stream.next();
#pragma unroll
        for (int step = 0; step < 16; step += Operand<T>::kDepth) {
          typename Operand<T>::A a[kTiles];
#pragma unroll
          for (int tile = 0; tile < kTiles; tile++) a[tile] = Operand<T>::a(maps, 16 * tile, group + step);
#pragma unroll
          for (int column = 0; column < kPieceColumns; column += 2)
            if ((first + column) * 8 < dims) {
              const auto b = Operand<T>::b_by_depth(stage, step, column * 8);
#pragma unroll
              for (int tile = 0; tile < kTiles; tile++)
                Operand<T>::multiply(sums[tile][first + column], sums[tile][first + column + 1], a[tile], b);
            }
        }
        stream.release();
      }
  }
}

// Writes sums * factor as rows of a head; columns from place.first_dim on.
template <class T, int kTiles, int kColumns>
REATTN_DEVICE void store_rows(const Params& p, const Tensor& tensor, const Place& place, int head,
                              const float (&sums)[kTiles][kColumns][4], float factor) {
  T* to = head_rows<T>(tensor, place.sample, head);
  const bool pairs = p.head_dim % 2 == 0;
#pragma unroll
  for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
    for (int lower = 0; lower < 2; lower++) {
      const int row = place.first_row + 16 * tile + 8 * lower + lane() / 4;
      if (row >= tensor.rows) continue;
#pragma unroll
      for (int column = 0; column < kColumns; column++) {
        const int dim = place.first_dim + column * 8 + lane() % 4 * 2;
        T* address = to + (row * tensor.row_stride + dim);
        const float first = sums[tile][column][2 * lower] * factor, second = sums[tile][column][2 * lower + 1] * factor;
        if (pairs) {
          if (dim < p.head_dim) Operand<T>::put_pair(address, first, second);
        } else {
          if (dim < p.head_dim) Operand<T>::put(address, first);
          if (dim + 1 < p.head_dim) Operand<T>::put(address + 1, second);
        }
      }
    }
}

}  // namespace reattn
