// What the float and the bfloat16 form of attention share.
#pragma once

#include <memory>

#include "kernels.h"

namespace hypersd {

constexpr int64_t kQueries = 48;  // queries at a time: a multiple of the rows of a product

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// One (batch, heads, tokens, dim) tensor.
struct Heads {
  View view;
  explicit Heads(const Tensor& t) : view(t) {}
  int64_t offset(int64_t head, int64_t token) const {
    const int64_t b = head / view.size[1], h = head % view.size[1];
    return b * view.stride[0] + h * view.stride[1] + token * view.stride[2];
  }
};

struct Problem {
  Heads q, k, v;
  int64_t heads, queries, keys, dim;
  double scale;
  const Heads* out = nullptr;  // forward
  const Heads *dout = nullptr, *dq = nullptr, *dk = nullptr, *dv = nullptr;  // backward
};

// Memory of one thread, cut into arrays that begin on whole vectors.
template <class C>
struct Scratch {
  std::unique_ptr<C[]> memory;
  C* next;
  explicit Scratch(int64_t count) : memory(new C[count + 2 * static_cast<int64_t>(64 / sizeof(C))]) {
    next = memory.get();
    while (reinterpret_cast<uintptr_t>(next) % 64) ++next;
  }
  C* take(int64_t count) {
    C* start = next;
    next += padded(count, static_cast<int64_t>(64 / sizeof(C)));
    return start;
  }
};

// Rows of scores to unnormalised probabilities (zeros from `keys` to `width`), and the factors that normalise them.
void softmax(float* s, int64_t rows, int64_t keys, int64_t width, float* norm);
// Rows of scores and of dP to P and dS = P * (dP - rowsum(P * dP)).
void slopes(float* s, float* ds, int64_t rows, int64_t keys, int64_t width);
// Rows of `ld` to `count` tokens, each times its factor, or all times one.
void unpack(const Heads& t, int64_t head, int64_t first, int64_t count, const float* rows, int64_t ld,
            const float* factors, float factor, float* buffer);

// bfloat16 tensors on a CPU with instructions for them; elsewhere they are computed in float.
bool multiplies_bfloat16();
void forward_bfloat16(const Problem& p, int64_t begin, int64_t end);   // blocks of queries of one head after another
void backward_bfloat16(const Problem& p, int64_t begin, int64_t end);  // heads

}  // namespace hypersd
