// The operator y = activation(group_norm(x + channel_bias) * gamma + beta): what every face of it calls.
//
// No TensorRT and no torch here: the TensorRT plugins, the torch operator and the host checks sit on these functions.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace canny2image {

enum class DataType : int32_t { kFloat = 0, kHalf = 1, kBFloat16 = 2 };
enum class Layout : int32_t { kNCHW = 0, kNHWC = 1 };
enum class Activation : int32_t { kNone = 0, kSiLU = 1 };

// One call. Statistics and arithmetic are FP32 whatever the types; sizes are in elements.
struct GroupNormParams {
    void const* x{nullptr};
    void* y{nullptr};                  // same type, layout and strides as x; may be x itself
    void const* gamma{nullptr};        // (parameterRows, channels)
    void const* beta{nullptr};         // (parameterRows, channels)
    void const* channelBias{nullptr};  // (batch, channels), added to x before the statistics, or null
    int64_t batch{0};
    int64_t channels{0};
    int64_t pixels{0};       // height times width
    int64_t pixelStride{0};  // NHWC: elements from one pixel to the next, at least `channels` (HWC8 pads to 8); NCHW: unused
    int64_t parameterRows{1};  // divides `batch`; each row serves batch / parameterRows samples, one after the other
    int32_t groups{0};       // divides `channels`
    float epsilon{0.0F};     // added to the variance
    Activation activation{Activation::kNone};
    Layout layout{Layout::kNCHW};
    DataType dataType{DataType::kFloat};       // of x and y
    DataType parameterType{DataType::kFloat};  // of gamma and beta: FP32 or `dataType`
    DataType biasType{DataType::kFloat};       // of channelBias: FP32 or `dataType`
};

// What is wrong with the parameters (pointers are not looked at), or null.
char const* checkGroupNorm(GroupNormParams const& params) noexcept;

// Bytes of device memory that `launchGroupNorm` wants for these sizes; 0 where it needs none. Only sizes, types and layout
// are looked at. The memory need not be cleared, is 256-byte aligned, and belongs to one launch at a time.
size_t groupNormWorkspaceSize(GroupNormParams const& params) noexcept;

// Enqueue the operator: no allocation, no synchronisation, the same bits for the same inputs, and capturable in a CUDA
// graph. Padding channels of an NHWC tensor with pixelStride > channels are written as zero.
//
// Where the device, the runtime and the driver can (sm_90, CUDA 12.3), its kernels begin while the one ahead of them in
// the stream ends, and wait for that end before they touch memory; they let the next kernel begin only after. The
// environment variable CANNY2IMAGE_GROUP_NORM_OVERLAP=0, looked at on the first call for a device, turns that off.
//
// Returns cudaErrorInvalidValue where `checkGroupNorm` finds fault or the workspace is too small, else the launch's error.
cudaError_t launchGroupNorm(
    GroupNormParams const& params, void* workspace, size_t workspaceSize, cudaStream_t stream) noexcept;

}  // namespace canny2image
