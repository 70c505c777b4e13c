// What the GroupNorm kernels compute with: elements of three types, the vectors that they are moved in, and SiLU. Plain
// code on the functions of group_norm_device.cuh.
#pragma once

#include "group_norm_device.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace canny2image {

// x / (1 + exp(-x)), which of minus infinity is NaN.
__device__ __forceinline__ float silu(float x) {
    constexpr float kLog2E = 1.4426950408889634F;
    return x * reciprocalFast(1.0F + exp2Fast(-kLog2E * x));
}

// The same of two values, for results of the half types: three uses of the unit for special functions, which is what
// large maps wait for, in place of four. One reciprocal of the product serves both, as 1 / a is b * (1 / (a * b)). For
// the product to stay finite exponentials end at 2^60, and a value below -40 counts as -40, whose result, -2e-16, is
// zero to within any rounding of what it was made from; so is that of minus infinity, which only an infinite gamma or
// beta gives. A NaN stays with its own value. The steps add at most four roundings of FP32, below 2^-22, to the 2^-11
// or 2^-8 of the result's own.
__device__ __forceinline__ void siluPair(float& x, float& y) {
    constexpr float kLog2E = 1.4426950408889634F;
    constexpr float kLeast = -40.0F;
    constexpr float kMost = 60.0F;  // above 40 * kLog2E
    float const a = 1.0F + exp2Fast(atMost(-kLog2E * x, kMost));
    float const b = 1.0F + exp2Fast(atMost(-kLog2E * y, kMost));
    float const inverse = reciprocalFast(a * b);
    x = atLeast(x, kLeast) * (inverse * b);
    y = atLeast(y, kLeast) * (inverse * a);
}

__device__ __forceinline__ float toFloat(float x) { return x; }
__device__ __forceinline__ float toFloat(__half x) { return __half2float(x); }
__device__ __forceinline__ float toFloat(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T fromFloat(float x);
template <>
__device__ __forceinline__ float fromFloat<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half fromFloat<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 fromFloat<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Pairs of elements as they lie in one 32-bit word, the lower address in the lower half.
__device__ __forceinline__ float2 unpackPair(__half, unsigned word) {
    __half2_raw const raw{static_cast<unsigned short>(word), static_cast<unsigned short>(word >> 16)};
    return __half22float2(__half2(raw));
}
__device__ __forceinline__ float2 unpackPair(__nv_bfloat16, unsigned word) {
    return make_float2(floatOfBits(word << 16), floatOfBits(word & 0xffff0000U));
}
__device__ __forceinline__ unsigned packPair(__half, float low, float high) {
    __half2_raw const raw = __floats2half2_rn(low, high);
    return raw.x | static_cast<unsigned>(raw.y) << 16;
}
__device__ __forceinline__ unsigned packPair(__nv_bfloat16, float low, float high) {
    __nv_bfloat162_raw const raw = __floats2bfloat162_rn(low, high);
    return raw.x | static_cast<unsigned>(raw.y) << 16;
}

// V neighbouring elements as they lie in memory, moved by one access: 16, 8 or 4 bytes, or one element.
template <typename T, int V>
struct alignas(V * sizeof(T)) Pack {
    static constexpr int kWords = static_cast<int>(V * sizeof(T) / 4);
    static_assert(kWords == 1 || kWords == 2 || kWords == 4, "a pack is one element, or 4, 8 or 16 bytes");
    unsigned words[kWords];

    __device__ __forceinline__ void unpack(float (&value)[V]) const {
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            if constexpr (sizeof(T) == 4) {
                value[i] = floatOfBits(words[i]);
            } else {
                float2 const pair = unpackPair(T{}, words[i]);
                value[2 * i] = pair.x;
                value[2 * i + 1] = pair.y;
            }
        }
    }

    __device__ __forceinline__ void pack(float const (&value)[V]) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            if constexpr (sizeof(T) == 4) {
                words[i] = bitsOfFloat(value[i]);
            } else {
                words[i] = packPair(T{}, value[2 * i], value[2 * i + 1]);
            }
        }
    }
};

template <typename T>
struct Pack<T, 1> {
    T bits;

    __device__ __forceinline__ void unpack(float (&value)[1]) const { value[0] = toFloat(bits); }
    __device__ __forceinline__ void pack(float const (&value)[1]) { bits = fromFloat<T>(value[0]); }
};

template <typename T, int V>
__device__ __forceinline__ void storePack(Pack<T, V>* global, Pack<T, V> const& pack) {
    if constexpr (V > 1) {
        storeWords(global, pack.words);
    } else {
        *global = pack;
    }
}

// From shared memory, 16 bytes.
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> loadParked(Pack<T, V> const* shared) {
    Pack<T, V> pack;
    loadSharedWords(shared, pack.words);
    return pack;
}

// Elements of 16 bytes.
template <typename T>
constexpr int kVector = static_cast<int>(16 / sizeof(T));

}  // namespace canny2image
