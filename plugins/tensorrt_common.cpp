#include "tensorrt_common.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>

// TensorRT 8 has no type for bfloat16.
#define CANNY2IMAGE_HAS_BF16 (NV_TENSORRT_MAJOR >= 10)
#define CANNY2IMAGE_TEXT_OF(value) #value
#define CANNY2IMAGE_TEXT(value) CANNY2IMAGE_TEXT_OF(value)
#ifndef CANNY2IMAGE_SOURCE_DIGEST
#define CANNY2IMAGE_SOURCE_DIGEST unknown
#endif

namespace canny2image {

namespace {

using Tensor = nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;
using Type = nvinfer1::DataType;

constexpr int32_t kX = 0;
constexpr int32_t kGamma = 1;
constexpr int32_t kBeta = 2;
constexpr int32_t kBias = 3;
constexpr char const* kInputNames[kMaxInputs] = {"x", "gamma", "beta", "channel_bias"};

constexpr int64_t kVectorChannels = 8;  // HWC8 pads the channels to a multiple of this
constexpr int32_t kMinRank = 3;         // N, C and at least one spatial dimension
constexpr int32_t kImageRank = 4;       // of HWC8, which counts the channel dimension from the end

// ---- Formats of x and y

struct Format {
    Type type;
    DataType dataType;
    TensorFormat format;
    Layout layout;
};

constexpr Format kFormats[] = {
    {Type::kFLOAT, DataType::kFloat, TensorFormat::kLINEAR, Layout::kNCHW},
    {Type::kHALF, DataType::kHalf, TensorFormat::kLINEAR, Layout::kNCHW},
    {Type::kHALF, DataType::kHalf, TensorFormat::kHWC8, Layout::kNHWC},
#if CANNY2IMAGE_HAS_BF16
    {Type::kBF16, DataType::kBFloat16, TensorFormat::kLINEAR, Layout::kNCHW},
    {Type::kBF16, DataType::kBFloat16, TensorFormat::kHWC8, Layout::kNHWC},
#endif
};

Format const* findFormat(Tensor const& tensor) noexcept {
    for (Format const& format : kFormats) {
        if (format.type == tensor.type && format.format == tensor.format) {
            return &format;
        }
    }
    return nullptr;
}

bool isParameterType(Type type, Type xType) noexcept { return type == Type::kFLOAT || type == xType; }

// Of a type that `isParameterType` accepts.
DataType parameterDataType(Type type, DataType xType) noexcept {
    return type == Type::kFLOAT ? DataType::kFloat : xType;
}

// ---- Looking up what TensorRT's libraries export

// Python loads them where the global scope does not see them, so the loaded ones are asked by name, too.
template <typename Function>
Function* findFunction(char const* name) noexcept {
    void* address = dlsym(RTLD_DEFAULT, name);
    constexpr char const* kLibraries[] = {
        "libnvinfer.so." CANNY2IMAGE_TEXT(NV_TENSORRT_MAJOR),
        "libnvinfer_lean.so." CANNY2IMAGE_TEXT(NV_TENSORRT_MAJOR),
        "libnvinfer_dispatch.so." CANNY2IMAGE_TEXT(NV_TENSORRT_MAJOR),
    };
    for (char const* library : kLibraries) {
        if (address != nullptr) {
            break;
        }
        // The handle is kept on purpose: a function found must stay where it is.
        void* handle = dlopen(library, RTLD_NOW | RTLD_NOLOAD);
        address = handle == nullptr ? nullptr : dlsym(handle, name);
    }
    return reinterpret_cast<Function*>(address);
}

std::atomic<nvinfer1::ILoggerFinder*> loggerFinder{nullptr};

nvinfer1::ILogger* findLogger() noexcept {
    try {
        if (nvinfer1::ILoggerFinder* finder = loggerFinder.load()) {
            if (nvinfer1::ILogger* logger = finder->findLogger()) {
                return logger;
            }
        }
        auto* function = findFunction<nvinfer1::ILogger*()>("getLogger");
        return function == nullptr ? nullptr : function();
    } catch (...) {
        return nullptr;  // a finder may throw; the message then goes to stderr
    }
}

// ---- Fields

bool readInt(nvinfer1::PluginField const& field, int32_t& value) noexcept {
    if (field.type != nvinfer1::PluginFieldType::kINT32 || field.length != 1 || field.data == nullptr) {
        CANNY2IMAGE_ERROR("attribute %s must be one int32 (got field type %d, length %d)", field.name,
            static_cast<int>(field.type), static_cast<int>(field.length));
        return false;
    }
    std::memcpy(&value, field.data, sizeof(value));
    return true;
}

bool readFloat(nvinfer1::PluginField const& field, float& value) noexcept {
    if (field.type != nvinfer1::PluginFieldType::kFLOAT32 || field.length != 1 || field.data == nullptr) {
        CANNY2IMAGE_ERROR("attribute %s must be one float32 (got field type %d, length %d)", field.name,
            static_cast<int>(field.type), static_cast<int>(field.length));
        return false;
    }
    std::memcpy(&value, field.data, sizeof(value));
    return true;
}

// The one check of values, for fields and serialised bytes alike.
bool makeAttributes(
    int32_t groups, float epsilon, int32_t activation, int32_t hasBias, Attributes& attributes) noexcept {
    if (groups < 1) {
        CANNY2IMAGE_ERROR("attribute %s is %d; it must be at least 1", kGroupsField, static_cast<int>(groups));
        return false;
    }
    if (!std::isfinite(epsilon) || epsilon < 0.0F) {
        CANNY2IMAGE_ERROR("attribute %s is %g; it must be finite and not negative", kEpsilonField,
            static_cast<double>(epsilon));
        return false;
    }
    if (activation != static_cast<int32_t>(Activation::kNone)
        && activation != static_cast<int32_t>(Activation::kSiLU)) {
        CANNY2IMAGE_ERROR(
            "attribute %s is %d; it must be 0 (none) or 1 (SiLU)", kActivationField, static_cast<int>(activation));
        return false;
    }
    if (hasBias != 0 && hasBias != 1) {
        CANNY2IMAGE_ERROR("attribute %s is %d; it must be 0 or 1", kHasBiasField, static_cast<int>(hasBias));
        return false;
    }
    attributes = Attributes{groups, epsilon, static_cast<Activation>(activation), hasBias == 1};
    return true;
}

// ---- Shapes

bool checkRank(int32_t rank, bool image) noexcept {
    if (rank < kMinRank || rank > nvinfer1::Dims::MAX_DIMS || (image && rank != kImageRank)) {
        CANNY2IMAGE_ERROR("x has %d dimensions; it must have %s", static_cast<int>(rank),
            image ? "4 in the HWC8 format" : "3 to 8: N, C and the spatial ones");
        return false;
    }
    return true;
}

bool checkGroups(Attributes const& attributes, int64_t channels) noexcept {
    if (channels < 1 || channels % attributes.groups != 0) {
        CANNY2IMAGE_ERROR("x has %" PRId64 " channels, which %d groups do not divide", channels,
            static_cast<int>(attributes.groups));
        return false;
    }
    return true;
}

// gamma, beta or the channel bias: linear, FP32 or x's type, of the wanted shape.
bool checkParameter(int32_t index, Tensor const& tensor, Type xType, nvinfer1::Dims const& wanted) noexcept {
    if (tensor.format != TensorFormat::kLINEAR || !isParameterType(tensor.type, xType)) {
        CANNY2IMAGE_ERROR("%s has type %d and format %d; it must be linear, in FP32 or x's type (%d)",
            kInputNames[index], static_cast<int>(tensor.type), static_cast<int>(tensor.format),
            static_cast<int>(xType));
        return false;
    }
    bool same = tensor.dims.nbDims == wanted.nbDims;
    for (int32_t i = 0; same && i < wanted.nbDims; ++i) {
        same = tensor.dims.d[i] == wanted.d[i];
    }
    if (!same) {
        bool const perImage = index == kBias;
        CANNY2IMAGE_ERROR("%s has %d dimensions, the first of %" PRId64 "; it must be %s, with C = %" PRId64
                          " as in x",
            kInputNames[index], static_cast<int>(tensor.dims.nbDims), static_cast<int64_t>(tensor.dims.d[0]),
            perImage ? "(N, C)" : "(C)", static_cast<int64_t>(wanted.d[perImage ? 1 : 0]));
        return false;
    }
    return true;
}

}  // namespace

// ---- Logging

void setFinder(nvinfer1::ILoggerFinder* finder) noexcept { loggerFinder.store(finder); }

void logMessage(nvinfer1::ILogger::Severity severity, char const* format, ...) noexcept {
    char text[1024];
    int const prefix = std::snprintf(text, sizeof(text), "%s: ", kPluginName);
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text + prefix, sizeof(text) - static_cast<size_t>(prefix), format, arguments);
    va_end(arguments);
    if (nvinfer1::ILogger* logger = findLogger()) {
        logger->log(severity, text);
    } else {
        std::fprintf(stderr, "%s\n", text);
    }
}

// ---- Attributes and their serialised form

nvinfer1::PluginFieldCollection const* declaredFields() noexcept {
    using nvinfer1::PluginField;
    using nvinfer1::PluginFieldType;
    static PluginField const kFields[] = {
        PluginField(kGroupsField, nullptr, PluginFieldType::kINT32, 1),
        PluginField(kEpsilonField, nullptr, PluginFieldType::kFLOAT32, 1),
        PluginField(kActivationField, nullptr, PluginFieldType::kINT32, 1),
        PluginField(kHasBiasField, nullptr, PluginFieldType::kINT32, 1),
    };
    static nvinfer1::PluginFieldCollection const kCollection{
        static_cast<int32_t>(sizeof(kFields) / sizeof(kFields[0])), kFields};
    return &kCollection;
}

bool parseFields(nvinfer1::PluginFieldCollection const* fields, Attributes& attributes) noexcept {
    if (fields == nullptr || fields->nbFields < 0 || (fields->nbFields > 0 && fields->fields == nullptr)) {
        CANNY2IMAGE_ERROR("no attributes were given");
        return false;
    }
    int32_t groups{0};
    int32_t activation{0};
    int32_t hasBias{0};
    float epsilon{0.0F};
    struct Integer {
        char const* name;
        int32_t* value;
        bool seen;
    } integers[] = {
        {kGroupsField, &groups, false}, {kActivationField, &activation, false}, {kHasBiasField, &hasBias, false}};
    bool seenEpsilon = false;
    for (int32_t i = 0; i < fields->nbFields; ++i) {
        nvinfer1::PluginField const& field = fields->fields[i];
        char const* const name = field.name == nullptr ? "" : field.name;
        bool* seen = nullptr;
        bool good = false;
        if (std::strcmp(name, kEpsilonField) == 0) {
            seen = &seenEpsilon;
            good = readFloat(field, epsilon);
        }
        for (Integer& integer : integers) {
            if (std::strcmp(name, integer.name) == 0) {
                seen = &integer.seen;
                good = readInt(field, *integer.value);
            }
        }
        if (seen == nullptr || *seen) {
            CANNY2IMAGE_ERROR("attribute '%s' is %s", name, seen == nullptr ? "unknown" : "given twice");
            return false;
        }
        if (!good) {
            return false;  // logged where it was read
        }
        *seen = true;
    }
    char const* missing = seenEpsilon ? nullptr : kEpsilonField;
    for (Integer const& integer : integers) {
        missing = integer.seen ? missing : integer.name;
    }
    if (missing != nullptr) {
        CANNY2IMAGE_ERROR("attribute %s is missing", missing);
        return false;
    }
    return makeAttributes(groups, epsilon, activation, hasBias, attributes);
}

State toState(Attributes const& attributes) noexcept {
    return State{kStateMark, kStateVersion, static_cast<uint32_t>(sizeof(State)), attributes.groups, attributes.epsilon,
        static_cast<int32_t>(attributes.activation), attributes.hasBias ? 1 : 0};
}

bool fromState(void const* data, size_t size, Attributes& attributes) noexcept {
    State state{};
    if (data == nullptr || size != sizeof(state)) {
        CANNY2IMAGE_ERROR(
            "the plan has %zu bytes for this plugin, not %zu; build the engine again", size, sizeof(state));
        return false;
    }
    std::memcpy(&state, data, sizeof(state));
    if (state.mark != kStateMark || state.version != kStateVersion || state.bytes != sizeof(state)) {
        CANNY2IMAGE_ERROR("the plan's bytes for this plugin are damaged or of another version (mark %08x, version %u, "
                          "length %u); build the engine again",
            static_cast<unsigned>(state.mark), static_cast<unsigned>(state.version),
            static_cast<unsigned>(state.bytes));
        return false;
    }
    return makeAttributes(state.groups, state.epsilon, state.activation, state.hasBias, attributes);
}

// ---- Tensors

bool isSupported(Attributes const& attributes, int32_t position, Tensor const* const* tensors, int32_t numInputs,
    int32_t numOutputs) noexcept {
    // Not logged: a "no" is an answer here, and TensorRT asks about every combination.
    if (numInputs != attributes.numInputs() || numOutputs != kNumOutputs || position < 0
        || position >= numInputs + numOutputs) {
        return false;
    }
    Tensor const& tensor = *tensors[position];
    Tensor const& x = *tensors[kX];
    if (position == kX) {
        // The rank may not be known yet, and is then no reason to refuse.
        bool const rankFits = tensor.dims.nbDims <= 0 || tensor.dims.nbDims == kImageRank;
        return findFormat(tensor) != nullptr && (tensor.format == TensorFormat::kLINEAR || rankFits);
    }
    if (position == numInputs) {
        return tensor.type == x.type && tensor.format == x.format;
    }
    if (tensor.format != TensorFormat::kLINEAR || !isParameterType(tensor.type, x.type)) {
        return false;
    }
    return position != kBeta || tensor.type == tensors[kGamma]->type;
}

bool checkCounts(Attributes const& attributes, int32_t numInputs, int32_t numOutputs) noexcept {
    if (numInputs != attributes.numInputs() || numOutputs != kNumOutputs) {
        CANNY2IMAGE_ERROR("%d inputs and %d outputs; with %s = %d there must be %d and %d", static_cast<int>(numInputs),
            static_cast<int>(numOutputs), kHasBiasField, attributes.hasBias ? 1 : 0,
            static_cast<int>(attributes.numInputs()), static_cast<int>(kNumOutputs));
        return false;
    }
    return true;
}

bool checkSymbolicShape(Attributes const& attributes, nvinfer1::DimsExprs const& x) noexcept {
    if (!checkRank(x.nbDims, false)) {
        return false;
    }
    nvinfer1::IDimensionExpr const* channels = x.d[1];
    return channels == nullptr || !channels->isConstant()
        || checkGroups(attributes, static_cast<int64_t>(channels->getConstantValue()));
}

bool checkOutput(Tensor const& x, Tensor const& y) noexcept {
    bool same = x.type == y.type && x.format == y.format && x.dims.nbDims == y.dims.nbDims;
    for (int32_t i = 0; same && i < x.dims.nbDims; ++i) {
        same = x.dims.d[i] == y.dims.d[i];
    }
    if (!same) {
        CANNY2IMAGE_ERROR("the output differs from x in type, format or shape");
    }
    return same;
}

bool makeParams(Attributes const& attributes, Tensor const* inputs, GroupNormParams& params) noexcept {
    Tensor const& x = inputs[kX];
    Format const* const format = findFormat(x);
    if (format == nullptr) {
        CANNY2IMAGE_ERROR("x has type %d and format %d, which are not supported together", static_cast<int>(x.type),
            static_cast<int>(x.format));
        return false;
    }
    if (!checkRank(x.dims.nbDims, format->layout == Layout::kNHWC)) {
        return false;
    }
    params = GroupNormParams{};
    params.batch = x.dims.d[0];
    params.channels = x.dims.d[1];
    params.pixels = 1;
    for (int32_t i = 0; i < x.dims.nbDims; ++i) {
        if (x.dims.d[i] < 0) {
            CANNY2IMAGE_ERROR("dimension %d of x is not known", static_cast<int>(i));
            return false;
        }
        params.pixels *= i < 2 ? 1 : static_cast<int64_t>(x.dims.d[i]);
    }
    if (!checkGroups(attributes, params.channels)) {
        return false;
    }
    nvinfer1::Dims perChannel{};
    perChannel.nbDims = 1;
    perChannel.d[0] = x.dims.d[1];
    nvinfer1::Dims perImage{};
    perImage.nbDims = 2;
    perImage.d[0] = x.dims.d[0];
    perImage.d[1] = x.dims.d[1];
    if (!checkParameter(kGamma, inputs[kGamma], x.type, perChannel)
        || !checkParameter(kBeta, inputs[kBeta], x.type, perChannel)
        || (attributes.hasBias && !checkParameter(kBias, inputs[kBias], x.type, perImage))) {
        return false;
    }
    if (inputs[kGamma].type != inputs[kBeta].type) {
        CANNY2IMAGE_ERROR("gamma and beta must be of one type");
        return false;
    }
    params.groups = attributes.groups;
    params.epsilon = attributes.epsilon;
    params.activation = attributes.activation;
    params.layout = format->layout;
    params.dataType = format->dataType;
    params.parameterType = parameterDataType(inputs[kGamma].type, format->dataType);
    params.biasType = attributes.hasBias ? parameterDataType(inputs[kBias].type, format->dataType) : DataType::kFloat;
    params.pixelStride = format->layout == Layout::kNHWC
        ? (params.channels + kVectorChannels - 1) / kVectorChannels * kVectorChannels
        : 0;
    char const* const fault = isEmpty(params) ? nullptr : checkGroupNorm(params);
    if (fault != nullptr) {
        CANNY2IMAGE_ERROR("%s", fault);
    }
    return fault == nullptr;
}

bool makeRange(Attributes const& attributes, nvinfer1::DynamicPluginTensorDesc const* inputs, Range& range) noexcept {
    Tensor smallest[kMaxInputs];
    Tensor largest[kMaxInputs];
    for (int32_t i = 0; i < attributes.numInputs(); ++i) {
        smallest[i] = inputs[i].desc;
        smallest[i].dims = inputs[i].min;
        largest[i] = inputs[i].desc;
        largest[i].dims = inputs[i].max;
    }
    if (!makeParams(attributes, smallest, range.min) || !makeParams(attributes, largest, range.max)) {
        return false;
    }
    if (range.min.channels != range.max.channels) {
        CANNY2IMAGE_ERROR("the number of channels must be fixed, and is %" PRId64 " to %" PRId64, range.min.channels,
            range.max.channels);
        return false;
    }
    return true;
}

size_t workspaceBound(Range const& range) noexcept {
    // A smaller problem may be cut into more blocks and so want more than the largest: halve down to the smallest. With
    // fixed shapes, which is what the engines of this project have, that is one call.
    size_t bound = 0;
    GroupNormParams params = range.max;
    int64_t const minBatch = std::max<int64_t>(range.min.batch, 1);
    int64_t const minPixels = std::max<int64_t>(range.min.pixels, 1);
    for (params.batch = range.max.batch; params.batch >= minBatch;) {
        for (params.pixels = range.max.pixels; params.pixels >= minPixels;) {
            bound = std::max(bound, groupNormWorkspaceSize(params));
            params.pixels = params.pixels == minPixels ? 0 : std::max(params.pixels / 2, minPixels);
        }
        params.batch = params.batch == minBatch ? 0 : std::max(params.batch / 2, minBatch);
    }
    return bound;
}

int32_t enqueueGroupNorm(Attributes const& attributes, Tensor const* inputDescs, Tensor const* outputDescs,
    void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
    if (inputDescs == nullptr || outputDescs == nullptr || inputs == nullptr || outputs == nullptr) {
        CANNY2IMAGE_ERROR("enqueue was called without tensors");
        return kFailure;
    }
    GroupNormParams params;
    if (!makeParams(attributes, inputDescs, params) || !checkOutput(inputDescs[kX], outputDescs[0])) {
        return kFailure;
    }
    if (isEmpty(params)) {
        return kSuccess;
    }
    params.x = inputs[kX];
    params.gamma = inputs[kGamma];
    params.beta = inputs[kBeta];
    params.channelBias = attributes.hasBias ? inputs[kBias] : nullptr;
    params.y = outputs[0];
    size_t const needed = groupNormWorkspaceSize(params);
    if (params.x == nullptr || params.y == nullptr || params.gamma == nullptr || params.beta == nullptr
        || (attributes.hasBias && params.channelBias == nullptr) || (needed > 0 && workspace == nullptr)) {
        CANNY2IMAGE_ERROR("enqueue was called with a null tensor or workspace");
        return kFailure;
    }
    cudaError_t const status = launchGroupNorm(params, workspace, needed, stream);
    if (status != cudaSuccess) {
        CANNY2IMAGE_ERROR("the launch for N %" PRId64 ", C %" PRId64 ", %" PRId64 " pixels, %d groups failed: %s",
            params.batch, params.channels, params.pixels, static_cast<int>(params.groups), cudaGetErrorString(status));
        return kFailure;
    }
    return kSuccess;
}

// ---- Registration

nvinfer1::IPluginRegistry* findRegistry() noexcept {
    auto* const version = findFunction<int32_t()>("getInferLibVersion");
    auto* const registry = findFunction<nvinfer1::IPluginRegistry*()>("getPluginRegistry");
    if (version == nullptr || registry == nullptr) {
        CANNY2IMAGE_ERROR("no TensorRT %d is loaded in this process; load it (Python: import tensorrt) first",
            NV_TENSORRT_MAJOR);
        return nullptr;
    }
    constexpr int32_t kTenThousands = 100000;  // up to TensorRT 9 the major counts thousands, from 10 on ten thousands
    int32_t const loaded = version();
    int32_t const major = loaded >= kTenThousands ? loaded / 10000 : loaded / 1000;
    if (major != NV_TENSORRT_MAJOR) {
        CANNY2IMAGE_ERROR("this library was built for TensorRT %d, and the process has loaded TensorRT %d; build it "
                          "again with plugins/build.sh",
            NV_TENSORRT_MAJOR, static_cast<int>(major));
        return nullptr;
    }
    nvinfer1::IPluginRegistry* const found = registry();
    if (found == nullptr) {
        CANNY2IMAGE_ERROR("TensorRT gave no plugin registry");
    }
    return found;
}

}  // namespace canny2image

char const* canny2imageFacts() noexcept {
    return "{\"plugin\": \"GroupNormSiLU\", \"plugin_version\": \"1\", \"namespace\": \"canny2image\", "
           "\"tensorrt\": \"" CANNY2IMAGE_TEXT(NV_TENSORRT_MAJOR) "." CANNY2IMAGE_TEXT(NV_TENSORRT_MINOR) "."
           CANNY2IMAGE_TEXT(NV_TENSORRT_PATCH) "." CANNY2IMAGE_TEXT(NV_TENSORRT_BUILD)
           "\", \"tensorrt_major\": " CANNY2IMAGE_TEXT(NV_TENSORRT_MAJOR)
           ", \"state_version\": 1, \"cuda\": " CANNY2IMAGE_TEXT(CUDART_VERSION)
           ", \"source\": \"" CANNY2IMAGE_TEXT(CANNY2IMAGE_SOURCE_DIGEST) "\"}";
}

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { canny2image::setFinder(finder); }
