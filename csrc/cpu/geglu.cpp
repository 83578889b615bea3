// y = value * gelu(gate), where a row of x holds the values and then the gates; gelu(g) = g Phi(g).
#include "elementary.h"
#include "kernels.h"

namespace hypersd {
namespace {

struct Problem {
  const char *x, *dy;  // dy null: forward
  char* out;           // y, or dx
  Type type;
  int64_t width;       // elements of a row of y
  int64_t chunks;      // of a row, fixed by the shape: the same bits on any number of threads
};

template <class T>
HYPERSD_INLINE void forward(const T* HYPERSD_RESTRICT value, const T* HYPERSD_RESTRICT gate, int64_t count,
                            T* HYPERSD_RESTRICT y) {
  for (int64_t i = 0; i < count; ++i) {
    const Work<T> g = widen(gate[i]);
    Work<T> phi, density;
    normal<sizeof(T) == 2>(g, phi, density);
    assign(y[i], widen(value[i]) * (g * phi));
  }
}

// d value = dy gelu(gate), d gate = dy value gelu'(gate), gelu'(g) = Phi(g) + g phi(g)
template <class T>
HYPERSD_INLINE void backward(const T* HYPERSD_RESTRICT value, const T* HYPERSD_RESTRICT gate,
                             const T* HYPERSD_RESTRICT dy, int64_t count, T* HYPERSD_RESTRICT dvalue,
                             T* HYPERSD_RESTRICT dgate) {
  for (int64_t i = 0; i < count; ++i) {
    const Work<T> g = widen(gate[i]), upstream = widen(dy[i]);
    Work<T> phi, density;
    normal<sizeof(T) == 2>(g, phi, density);
    assign(dvalue[i], upstream * (g * phi));
    assign(dgate[i], upstream * widen(value[i]) * (phi + g * density));
  }
}

template <class T>
HYPERSD_INLINE void over_range(const Problem& p, int64_t begin, int64_t end) {
  const T *x = reinterpret_cast<const T*>(p.x), *dy = reinterpret_cast<const T*>(p.dy);
  T* out = reinterpret_cast<T*>(p.out);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t row = index / p.chunks, first = (index - row * p.chunks) * kChunk;
    const int64_t count = p.width - first < kChunk ? p.width - first : kChunk;
    const int64_t narrow = row * p.width + first, at = narrow + row * p.width;  // in y and in x
    if (p.dy) backward<T>(x + at, x + at + p.width, dy + narrow, count, out + at, out + at + p.width);
    else forward<T>(x + at, x + at + p.width, count, out + narrow);
  }
}
HYPERSD_INLINE void run_body(const Problem& p, int64_t begin, int64_t end) {
  switch (p.type) {
    case Type::float64: over_range<double>(p, begin, end); break;
    case Type::float32: over_range<float>(p, begin, end); break;
    case Type::bfloat16: over_range<BFloat>(p, begin, end); break;
    default: over_range<Half>(p, begin, end);
  }
}
HYPERSD_KERNEL(run, (const Problem& p, int64_t begin, int64_t end), (p, begin, end))

int64_t chunks_of(int64_t width) { return (width + kChunk - 1) / kChunk; }

// Runs over all chunks of all rows, `grain` of them to a thread at least: 8,192 elements of y.
void over_chunks(const Problem& p, int64_t elements) {
  if (elements == 0) return;
  const int64_t size = p.width < kChunk ? p.width : kChunk;
  parallel_for(elements / p.width * p.chunks, 8 * kChunk / size,
               [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

// Sizes and strides of a row-major tensor like `view`, its last dimension replaced.
struct RowMajor {
  int64_t size[64], stride[64];

  RowMajor(const View& view, int64_t last) {
    STD_TORCH_CHECK(view.dim <= 64, "x: too many dimensions");
    for (int64_t d = view.dim - 1, running = 1; d >= 0; --d) {
      size[d] = d == view.dim - 1 ? last : view.size[d];
      stride[d] = running;
      running *= size[d] ? size[d] : 1;
    }
  }
};

View checked(const Tensor& x) {
  const View view(x);
  STD_TORCH_CHECK(view.dim > 0 && view.size[view.dim - 1] % 2 == 0, "x: expected an even last dimension");
  STD_TORCH_CHECK(view.type != Type::other, "x: not a floating-point tensor");
  STD_TORCH_CHECK(x.is_cpu(), "x: expected a CPU tensor");
  return view;
}

}  // namespace

Tensor geglu(Tensor x) {
  const View shape = checked(x);
  const int64_t width = shape.size[shape.dim - 1] / 2;
  const RowMajor rows(shape, 2 * width), halves(shape, width);
  View layout = shape, out = shape;
  layout.stride = rows.stride;
  out.size = halves.size;
  Tensor y = empty_strided(out, halves.stride, shape.type);
  std::optional<Tensor> kept;
  const Problem p{matched(x, shape, layout, kept), nullptr, data_of(y), shape.type, width, chunks_of(width)};
  over_chunks(p, shape.numel / 2);
  return y;
}

Tensor geglu_backward(Tensor dy, Tensor x) {
  const View shape = checked(x), upstream(dy);
  const int64_t width = shape.size[shape.dim - 1] / 2;
  const RowMajor rows(shape, 2 * width), halves(shape, width);
  View layout = shape, out = shape;
  layout.stride = rows.stride;
  out.size = halves.size, out.stride = halves.stride;
  STD_TORCH_CHECK(upstream.same_size(out) && upstream.type == shape.type, "dy: not a gradient of geglu(x)");
  Tensor dx = empty_strided(layout, rows.stride, shape.type);
  std::optional<Tensor> kept[2];
  const Problem p{matched(x, shape, layout, kept[0]), matched(dy, upstream, out, kept[1]), data_of(dx), shape.type, width,
                  chunks_of(width)};
  over_chunks(p, shape.numel / 2);
  return dx;
}

}  // namespace hypersd
