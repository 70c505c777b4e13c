// What the TensorRT faces of the operator share: attributes, formats, the serialised form, logging, registration.
//
// The library refers to no symbol of TensorRT's libraries: what it needs of them it looks up in the process, so that it
// loads anywhere and can say what is missing instead of failing in the loader.
#pragma once

#include "group_norm.h"

#include <NvInferRuntime.h>

#include <cstddef>
#include <cstdint>
#include <exception>

#define CANNY2IMAGE_EXPORT extern "C" __attribute__((visibility("default")))

namespace canny2image {

constexpr char const* kPluginName = "GroupNormSiLU";
constexpr char const* kPluginVersion = "1";
constexpr char const* kPluginNamespace = "canny2image";

constexpr char const* kGroupsField = "groups";          // int32, divides the channels
constexpr char const* kEpsilonField = "epsilon";        // float32, added to the variance
constexpr char const* kActivationField = "activation";  // int32, a value of `Activation`
constexpr char const* kHasBiasField = "has_bias";       // int32, 1 where there is a fourth input (N, C)

constexpr int32_t kMaxInputs = 4;  // x, gamma, beta, channel bias
constexpr int32_t kNumOutputs = 1;

// What a call of TensorRT's interfaces returns where it fails; 0 is success.
constexpr int32_t kSuccess = 0;
constexpr int32_t kFailure = 1;

struct Attributes {
    int32_t groups{0};
    float epsilon{0.0F};
    Activation activation{Activation::kNone};
    bool hasBias{false};

    int32_t numInputs() const noexcept { return hasBias ? kMaxInputs : kMaxInputs - 1; }

    bool operator==(Attributes const& other) const noexcept {
        return groups == other.groups && epsilon == other.epsilon && activation == other.activation
            && hasBias == other.hasBias;
    }
};

// ---- Logging

// Where TensorRT's own way to a logger is given (`setLoggerFinder`), else its process-wide logger, else stderr.
void setFinder(nvinfer1::ILoggerFinder* finder) noexcept;
__attribute__((format(printf, 2, 3))) void logMessage(
    nvinfer1::ILogger::Severity severity, char const* format, ...) noexcept;
#define CANNY2IMAGE_ERROR(...) ::canny2image::logMessage(nvinfer1::ILogger::Severity::kERROR, __VA_ARGS__)

// `function()`, or `failure` where it throws: no exception may cross into TensorRT.
template <typename Result, typename Function>
Result guarded(char const* what, Result failure, Function&& function) noexcept {
    try {
        return function();
    } catch (std::exception const& error) {
        CANNY2IMAGE_ERROR("%s: %s", what, error.what());
    } catch (...) {
        CANNY2IMAGE_ERROR("%s: an unknown exception", what);
    }
    return failure;
}

// ---- Attributes and their serialised form

// What a creator declares, for the ONNX parser.
nvinfer1::PluginFieldCollection const* declaredFields() noexcept;
// False, with the reason logged, unless every attribute is there once, with the declared type and a legal value.
bool parseFields(nvinfer1::PluginFieldCollection const* fields, Attributes& attributes) noexcept;

// The bytes in a plan. They begin with a mark, a version and their own length, so that a damaged plan or one of another
// version is refused rather than misread.
struct State {
    uint32_t mark;
    uint32_t version;
    uint32_t bytes;
    int32_t groups;
    float epsilon;
    int32_t activation;
    int32_t hasBias;
};
static_assert(sizeof(State) == 28, "the serialised form must have no padding");
constexpr uint32_t kStateMark = 0x314E4743;  // "CGN1" in memory
constexpr uint32_t kStateVersion = 1;

State toState(Attributes const& attributes) noexcept;
// False, with the reason logged, where the bytes are not a state that this version wrote.
bool fromState(void const* data, size_t size, Attributes& attributes) noexcept;

// ---- Tensors

// Whether the tensor at `position` may have its type and format, given those before it; `tensors` are inputs, outputs.
bool isSupported(Attributes const& attributes, int32_t position, nvinfer1::PluginTensorDesc const* const* tensors,
    int32_t numInputs, int32_t numOutputs) noexcept;

// Each of these logs what is wrong and returns false.
bool checkCounts(Attributes const& attributes, int32_t numInputs, int32_t numOutputs) noexcept;
bool checkSymbolicShape(Attributes const& attributes, nvinfer1::DimsExprs const& x) noexcept;
bool checkOutput(nvinfer1::PluginTensorDesc const& x, nvinfer1::PluginTensorDesc const& y) noexcept;
// Concrete sizes, types and layout; `inputs` has attributes.numInputs() entries. Pointers stay null. An empty tensor is
// no fault: `isEmpty` tells.
bool makeParams(
    Attributes const& attributes, nvinfer1::PluginTensorDesc const* inputs, GroupNormParams& params) noexcept;
inline bool isEmpty(GroupNormParams const& params) noexcept { return params.batch == 0 || params.pixels == 0; }

// The smallest and the largest problem of a profile. False, with the reason logged, where either is impossible.
struct Range {
    GroupNormParams min;
    GroupNormParams max;
};
bool makeRange(
    Attributes const& attributes, nvinfer1::DynamicPluginTensorDesc const* inputs, Range& range) noexcept;
// Bytes that are enough for every problem of a range.
size_t workspaceBound(Range const& range) noexcept;

int32_t enqueueGroupNorm(Attributes const& attributes, nvinfer1::PluginTensorDesc const* inputDescs,
    nvinfer1::PluginTensorDesc const* outputDescs, void const* const* inputs, void* const* outputs, void* workspace,
    cudaStream_t stream) noexcept;

// ---- Registration

// The process's plugin registry, or null with the reason logged: no TensorRT loaded, or one of another major.
nvinfer1::IPluginRegistry* findRegistry() noexcept;

// What `canny2imageRegister` returns.
enum class Registration : int32_t { kDone = 0, kNoRegistry = 1, kRefused = 2 };

// Registers `creator` unless `isRegistered(registry)`: what the two generations of creators do alike.
template <typename Creator, typename IsRegistered>
int32_t registerOnce(Creator& creator, IsRegistered isRegistered) noexcept {
    return guarded("canny2imageRegister", static_cast<int32_t>(Registration::kRefused), [&] {
        nvinfer1::IPluginRegistry* const registry = findRegistry();
        if (registry == nullptr) {
            return static_cast<int32_t>(Registration::kNoRegistry);
        }
        if (isRegistered(*registry) || registry->registerCreator(creator, kPluginNamespace)) {
            return static_cast<int32_t>(Registration::kDone);
        }
        CANNY2IMAGE_ERROR("TensorRT refused to register the plugin");
        return static_cast<int32_t>(Registration::kRefused);
    });
}

}  // namespace canny2image

// Registers the creator under our namespace in the registry of the TensorRT that the process has loaded, for users who
// load the library by dlopen (Python's ctypes); again is no fault. Returns a `Registration`.
CANNY2IMAGE_EXPORT int32_t canny2imageRegister() noexcept;
// JSON: what the library was built from and for.
CANNY2IMAGE_EXPORT char const* canny2imageFacts() noexcept;
// The names that IPluginRegistry::loadLibrary looks for, beside getPluginCreators (8.6) or getCreators (10 and later).
CANNY2IMAGE_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder);
