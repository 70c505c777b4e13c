// The operator for TensorRT 10 and 11: IPluginV3 with its three capabilities, and its creator.

#include "tensorrt_common.h"

#if NV_TENSORRT_MAJOR < 10
#error "tensorrt_v3.cpp is for TensorRT 10 and later; 8.6 takes tensorrt_v2.cpp"
#endif

#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <new>

namespace canny2image {

namespace {

using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

// The one field in a plan: the bytes of a `State`.
constexpr char const* kStateField = "state";

class GroupNormPlugin final : public nvinfer1::IPluginV3,
                              public nvinfer1::IPluginV3OneCore,
                              public nvinfer1::IPluginV3OneBuild,
                              public nvinfer1::IPluginV3OneRuntime {
public:
    explicit GroupNormPlugin(Attributes const& attributes) noexcept : mAttributes(attributes) {}

    // IPluginV3

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
        switch (type) {
        case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        CANNY2IMAGE_ERROR("TensorRT asked for the unknown capability %d", static_cast<int>(type));
        return nullptr;
    }

    nvinfer1::IPluginV3* clone() noexcept override {
        // The state's field points into its own object, so a copy is made from the attributes alone.
        return guarded("clone", static_cast<nvinfer1::IPluginV3*>(nullptr),
            [&]() -> nvinfer1::IPluginV3* { return new GroupNormPlugin(mAttributes); });
    }

    // IPluginV3OneCore

    char const* getPluginName() const noexcept override { return kPluginName; }
    char const* getPluginVersion() const noexcept override { return kPluginVersion; }
    char const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

    // IPluginV3OneBuild

    int32_t getNbOutputs() const noexcept override { return kNumOutputs; }

    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t numOutputs,
        nvinfer1::DataType const* inputTypes, int32_t numInputs) const noexcept override {
        if (outputTypes == nullptr || inputTypes == nullptr || !checkCounts(mAttributes, numInputs, numOutputs)) {
            return kFailure;
        }
        outputTypes[0] = inputTypes[0];
        return kSuccess;
    }

    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t numInputs,
        nvinfer1::DimsExprs const* /*shapeInputs*/, int32_t /*numShapeInputs*/, nvinfer1::DimsExprs* outputs,
        int32_t numOutputs, nvinfer1::IExprBuilder& /*builder*/) noexcept override {
        if (inputs == nullptr || outputs == nullptr || !checkCounts(mAttributes, numInputs, numOutputs)
            || !checkSymbolicShape(mAttributes, inputs[0])) {
            return kFailure;
        }
        outputs[0] = inputs[0];
        return kSuccess;
    }

    bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors, int32_t numInputs,
        int32_t numOutputs) noexcept override {
        if (tensors == nullptr || position < 0 || position >= kMaxInputs + kNumOutputs) {
            return false;
        }
        PluginTensorDesc const* pointers[kMaxInputs + kNumOutputs]{};
        for (int32_t i = 0; i <= position; ++i) {
            pointers[i] = &tensors[i].desc;
        }
        return isSupported(mAttributes, position, pointers, numInputs, numOutputs);
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t numInputs,
        DynamicPluginTensorDesc const* outputs, int32_t numOutputs) noexcept override {
        Range range;
        if (inputs == nullptr || outputs == nullptr) {
            CANNY2IMAGE_ERROR("configurePlugin was called without tensors");
            return kFailure;
        }
        bool const good = checkCounts(mAttributes, numInputs, numOutputs) && makeRange(mAttributes, inputs, range);
        return good ? kSuccess : kFailure;
    }

    size_t getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t numInputs,
        DynamicPluginTensorDesc const* /*outputs*/, int32_t numOutputs) const noexcept override {
        Range range;
        if (inputs == nullptr || !checkCounts(mAttributes, numInputs, numOutputs)
            || !makeRange(mAttributes, inputs, range)) {
            return 0;
        }
        return workspaceBound(range);
    }

    char const* getTimingCacheID() noexcept override {
        // Epsilon by its bits: decimals would make near ones equal.
        uint32_t bits{0};
        std::memcpy(&bits, &mAttributes.epsilon, sizeof(bits));
        std::snprintf(mTimingCacheID, sizeof(mTimingCacheID), "g%de%08" PRIx32 "a%db%d",
            static_cast<int>(mAttributes.groups), bits, static_cast<int>(mAttributes.activation),
            mAttributes.hasBias ? 1 : 0);
        return mTimingCacheID;
    }

    // IPluginV3OneRuntime

    int32_t onShapeChange(PluginTensorDesc const* inputs, int32_t numInputs, PluginTensorDesc const* outputs,
        int32_t numOutputs) noexcept override {
        GroupNormParams params;
        if (inputs == nullptr || outputs == nullptr) {
            CANNY2IMAGE_ERROR("onShapeChange was called without tensors");
            return kFailure;
        }
        bool const good = checkCounts(mAttributes, numInputs, numOutputs) && makeParams(mAttributes, inputs, params)
            && checkOutput(inputs[0], outputs[0]);
        return good ? kSuccess : kFailure;
    }

    int32_t enqueue(PluginTensorDesc const* inputDescs, PluginTensorDesc const* outputDescs, void const* const* inputs,
        void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        return enqueueGroupNorm(mAttributes, inputDescs, outputDescs, inputs, outputs, workspace, stream);
    }

    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* /*context*/) noexcept override {
        return clone();  // nothing of a context is used: each has its own workspace
    }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override {
        mState = toState(mAttributes);
        mField = PluginField(kStateField, &mState, PluginFieldType::kUNKNOWN, static_cast<int32_t>(sizeof(mState)));
        mFields.nbFields = 1;
        mFields.fields = &mField;
        return &mFields;
    }

private:
    Attributes mAttributes;
    // What getTimingCacheID and getFieldsToSerialize lend out.
    char mTimingCacheID[64]{};
    State mState{};
    PluginField mField{};
    PluginFieldCollection mFields{};
};

// The attributes that a plan holds.
bool parsePlan(PluginFieldCollection const* fields, Attributes& attributes) noexcept {
    bool const one = fields != nullptr && fields->nbFields == 1 && fields->fields != nullptr;
    if (!one || fields->fields[0].name == nullptr || std::strcmp(fields->fields[0].name, kStateField) != 0
        || fields->fields[0].length < 0) {
        CANNY2IMAGE_ERROR("the plan holds more or less than one field '%s'; build the engine again", kStateField);
        return false;
    }
    return fromState(fields->fields[0].data, static_cast<size_t>(fields->fields[0].length), attributes);
}

class GroupNormCreator final : public nvinfer1::IPluginCreatorV3One {
public:
    char const* getPluginName() const noexcept override { return kPluginName; }
    char const* getPluginVersion() const noexcept override { return kPluginVersion; }
    char const* getPluginNamespace() const noexcept override { return kPluginNamespace; }
    PluginFieldCollection const* getFieldNames() noexcept override { return declaredFields(); }

    nvinfer1::IPluginV3* createPlugin(
        char const* name, PluginFieldCollection const* fields, nvinfer1::TensorRTPhase phase) noexcept override {
        return guarded("createPlugin", static_cast<nvinfer1::IPluginV3*>(nullptr), [&]() -> nvinfer1::IPluginV3* {
            Attributes attributes;
            bool const building = phase == nvinfer1::TensorRTPhase::kBUILD;
            if (!(building ? parseFields(fields, attributes) : parsePlan(fields, attributes))) {
                CANNY2IMAGE_ERROR("node '%s' was not %s", name == nullptr ? "" : name, building ? "made" : "restored");
                return nullptr;
            }
            return new GroupNormPlugin(attributes);
        });
    }
};

GroupNormCreator& creator() {
    static GroupNormCreator instance;
    return instance;
}

}  // namespace

}  // namespace canny2image

CANNY2IMAGE_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&canny2image::creator()};
    count = 1;
    return creators;
}

int32_t canny2imageRegister() noexcept {
    using namespace canny2image;
    return registerOnce(creator(), [](nvinfer1::IPluginRegistry& registry) {
        return registry.getCreator(kPluginName, kPluginVersion, kPluginNamespace) != nullptr;
    });
}
