// 16-bit floating-point numbers to float and back, without branches.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace hypersd {

HYPERSD_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
HYPERSD_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
HYPERSD_INLINE float from_bfloat16(uint16_t h) { return bits_to_float(uint32_t{h} << 16); }
HYPERSD_INLINE uint16_t to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}
// fp16 without branches, so that the loops vectorise: rescale by exact powers of two, and let the FPU round.
HYPERSD_INLINE float from_half(uint16_t h) {
  const uint32_t shifted = uint32_t{h} << 16, twice = shifted + shifted;
  const float normal = bits_to_float((twice >> 4) + (uint32_t{0xe0} << 23)) * 0x1p-112f;
  const float subnormal = bits_to_float((twice >> 17) | (uint32_t{126} << 23)) - 0.5f;
  const uint32_t magnitude = float_to_bits(twice < (uint32_t{1} << 27) ? subnormal : normal);
  return bits_to_float((shifted & 0x80000000u) | magnitude);
}
HYPERSD_INLINE uint16_t to_half(float value) {
  const uint32_t bits = float_to_bits(value), sign = bits & 0x80000000u, twice = bits + bits;
  float base = (bits_to_float(bits & 0x7fffffffu) * 0x1p112f) * 0x1p-110f;
  uint32_t bias = twice & 0xff000000u;
  bias = bias < 0x71000000u ? 0x71000000u : bias;
  base = bits_to_float((bias >> 1) + 0x07800000u) + base;
  const uint32_t rounded = float_to_bits(base);
  const uint32_t magnitude = (rounded >> 13 & 0x7c00u) + (rounded & 0xfffu);
  return static_cast<uint16_t>(sign >> 16 | (twice > 0xff000000u ? 0x7e00u : magnitude));
}

}  // namespace hypersd
