// The torch face of the operator: the CUDA kernel of `canny2image::group_norm_silu`.
//
// plugins/torch_operator.py defines the schema, the CPU and fake implementations, and builds and loads this file. It is
// registered with the dispatcher and has no Python in it, so that it compiles fast and fits every Python version.
#include "group_norm.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/GradMode.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>
#include <torch/version.h>

#include <optional>
#include <string>

namespace canny2image {
namespace {

#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 4
using OptionalTensor = c10::optional<at::Tensor>;  // a class of its own before it became the standard's
#else
using OptionalTensor = std::optional<at::Tensor>;
#endif

DataType dataTypeOf(at::Tensor const& tensor, char const* name) {
    switch (tensor.scalar_type()) {
        case at::kFloat: return DataType::kFloat;
        case at::kHalf: return DataType::kHalf;
        case at::kBFloat16: return DataType::kBFloat16;
        default:
            TORCH_CHECK_VALUE(false, "group_norm_silu: ", name, " is ", tensor.scalar_type(),
                              "; on CUDA it must be float32, float16 or bfloat16");
    }
}

Activation activationOf(std::string const& name) {
    TORCH_CHECK_VALUE(name == "none" || name == "silu",
                      "group_norm_silu: activation must be 'none' or 'silu', got '", name, "'");
    return name == "silu" ? Activation::kSiLU : Activation::kNone;
}

// The kernels know no gradients; the plain formula in PyTorch does.
void refuseGradient(at::Tensor const& tensor, char const* name) {
    TORCH_CHECK(!(c10::GradMode::is_enabled() && tensor.requires_grad()), "group_norm_silu has no gradient and ", name,
                " requires one: call it under torch.no_grad() or torch.inference_mode(), or use fused_group_norm");
}

// The type of a parameter or bias, checked to lie on the device of `x` in FP32 or the type of `x`.
DataType besideX(at::Tensor const& tensor, char const* name, at::Tensor const& x) {
    TORCH_CHECK_VALUE(tensor.device() == x.device(), "group_norm_silu: ", name, " is on ", tensor.device(),
                      " and x on ", x.device());
    TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == x.scalar_type(),
                      "group_norm_silu: ", name, " is ", tensor.scalar_type(), "; it must be float32 or the type of x, ",
                      x.scalar_type());
    refuseGradient(tensor, name);
    return dataTypeOf(tensor, name);
}

// The (batch, channels) bias in memory order; the one row of a (1, channels) bias is repeated.
at::Tensor wholeBias(at::Tensor const& bias, int64_t batch, int64_t channels) {
    TORCH_CHECK_VALUE(bias.dim() == 2 && (bias.size(0) == batch || bias.size(0) == 1) && bias.size(1) == channels,
                      "group_norm_silu: channel_bias must be (", batch, ", ", channels, ") or (1, ", channels,
                      "), got ", bias.sizes());
    return bias.expand({batch, channels}).contiguous();
}

at::Tensor groupNormSilu(at::Tensor const& input, at::Tensor const& gamma, at::Tensor const& beta,
                         OptionalTensor const& channelBias, int64_t groups, double epsilon,
                         std::string const& activation) {
    TORCH_CHECK_VALUE(input.dim() == 4, "group_norm_silu: x must be (N, C, H, W), got ", input.sizes());
    refuseGradient(input, "x");
    c10::cuda::CUDAGuard const guard(input.device());
    // Both layouts run as they are; anything else (a slice, a transpose) is copied once.
    bool const linear = input.is_contiguous();
    bool const pixelMajor = !linear && input.is_contiguous(at::MemoryFormat::ChannelsLast);
    at::Tensor const x = linear || pixelMajor ? input : input.contiguous();

    GroupNormParams params;
    params.batch = x.size(0);
    params.channels = x.size(1);
    params.pixels = x.size(2) * x.size(3);
    params.pixelStride = params.channels;
    params.layout = pixelMajor ? Layout::kNHWC : Layout::kNCHW;
    params.dataType = dataTypeOf(x, "x");
    params.activation = activationOf(activation);
    params.epsilon = static_cast<float>(epsilon);
    TORCH_CHECK_VALUE(groups > 0 && groups <= params.channels && params.channels % groups == 0,
                      "group_norm_silu: ", params.channels, " channels cannot be split into ", groups, " groups");
    params.groups = static_cast<int32_t>(groups);

    int64_t const rows = gamma.dim() == 2 ? gamma.size(0) : 1;
    TORCH_CHECK_VALUE((gamma.dim() == 1 || gamma.dim() == 2) && gamma.size(-1) == params.channels && rows > 0 &&
                          params.batch % rows == 0 && beta.sizes() == gamma.sizes(),
                      "group_norm_silu: gamma and beta must be (", params.channels, ") or (rows, ", params.channels,
                      ") with rows dividing the batch ", params.batch, ", got ", gamma.sizes(), " and ", beta.sizes());
    params.parameterRows = rows;
    params.parameterType = besideX(gamma, "gamma", x);
    TORCH_CHECK_VALUE(besideX(beta, "beta", x) == params.parameterType, "group_norm_silu: gamma is ",
                      gamma.scalar_type(), " and beta ", beta.scalar_type(), "; they must have one type");
    at::Tensor const scale = gamma.contiguous();
    at::Tensor const shift = beta.contiguous();
    at::Tensor bias;
    if (channelBias.has_value()) {
        params.biasType = besideX(*channelBias, "channel_bias", x);
        bias = wholeBias(*channelBias, params.batch, params.channels);
        params.channelBias = bias.const_data_ptr();
    }

    at::Tensor y = at::empty_like(x);  // keeps the strides
    if (y.numel() == 0) {
        return y;
    }
    params.x = x.const_data_ptr();
    params.y = y.mutable_data_ptr();
    params.gamma = scale.const_data_ptr();
    params.beta = shift.const_data_ptr();
    char const* const fault = checkGroupNorm(params);
    TORCH_CHECK_VALUE(fault == nullptr, "group_norm_silu: ", fault);

    // The caching allocator orders by stream: the memory may be handed on at return, and used only after the kernels.
    size_t const workspaceSize = groupNormWorkspaceSize(params);
    at::Tensor workspace;
    if (workspaceSize > 0) {
        workspace = at::empty({static_cast<int64_t>(workspaceSize)}, x.options().dtype(at::kByte));
    }
    auto const stream = c10::cuda::getCurrentCUDAStream(x.get_device());
    void* const memory = workspaceSize > 0 ? workspace.mutable_data_ptr() : nullptr;
    C10_CUDA_CHECK(launchGroupNorm(params, memory, workspaceSize, stream));
    return y;
}

}  // namespace
}  // namespace canny2image

TORCH_LIBRARY_IMPL(canny2image, CUDA, library) {
    library.impl("group_norm_silu", &canny2image::groupNormSilu);
}
