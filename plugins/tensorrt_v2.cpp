// The operator for TensorRT 8.6: IPluginV2DynamicExt and its creator.

#include "tensorrt_common.h"

#if NV_TENSORRT_MAJOR != 8
#error "tensorrt_v2.cpp is for TensorRT 8.6; later ones take tensorrt_v3.cpp"
#endif

#include <cstring>
#include <new>
#include <string>

namespace canny2image {

namespace {

using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

class GroupNormPlugin final : public nvinfer1::IPluginV2DynamicExt {
public:
    GroupNormPlugin(Attributes const& attributes, char const* space) : mAttributes(attributes), mNamespace(space) {}

    // IPluginV2

    char const* getPluginType() const noexcept override { return kPluginName; }
    char const* getPluginVersion() const noexcept override { return kPluginVersion; }
    int32_t getNbOutputs() const noexcept override { return kNumOutputs; }
    int32_t initialize() noexcept override { return kSuccess; }
    void terminate() noexcept override {}
    void destroy() noexcept override { delete this; }
    size_t getSerializationSize() const noexcept override { return sizeof(State); }

    void serialize(void* buffer) const noexcept override {
        if (buffer == nullptr) {
            CANNY2IMAGE_ERROR("serialize was called without a buffer");
            return;
        }
        State const state = toState(mAttributes);
        std::memcpy(buffer, &state, sizeof(state));
    }

    void setPluginNamespace(char const* space) noexcept override {
        guarded("setPluginNamespace", kFailure, [&] {
            mNamespace = space == nullptr ? "" : space;
            return kSuccess;
        });
    }

    char const* getPluginNamespace() const noexcept override { return mNamespace.c_str(); }

    // IPluginV2Ext

    nvinfer1::DataType getOutputDataType(
        int32_t index, nvinfer1::DataType const* types, int32_t numInputs) const noexcept override {
        if (index != 0 || types == nullptr || !checkCounts(mAttributes, numInputs, kNumOutputs)) {
            CANNY2IMAGE_ERROR("getOutputDataType: there is no output %d of these inputs", static_cast<int>(index));
            return nvinfer1::DataType::kFLOAT;  // the interface has no way to fail; configurePlugin and enqueue have
        }
        return types[0];
    }

    // IPluginV2DynamicExt

    GroupNormPlugin* clone() const noexcept override {
        return guarded("clone", static_cast<GroupNormPlugin*>(nullptr), [&] { return new GroupNormPlugin(*this); });
    }

    nvinfer1::DimsExprs getOutputDimensions(int32_t index, nvinfer1::DimsExprs const* inputs, int32_t numInputs,
        nvinfer1::IExprBuilder& /*builder*/) noexcept override {
        if (index != 0 || inputs == nullptr || !checkCounts(mAttributes, numInputs, kNumOutputs)
            || !checkSymbolicShape(mAttributes, inputs[0])) {
            return nvinfer1::DimsExprs{-1, {}};
        }
        return inputs[0];
    }

    bool supportsFormatCombination(
        int32_t position, PluginTensorDesc const* tensors, int32_t numInputs, int32_t numOutputs) noexcept override {
        if (tensors == nullptr || position < 0 || position >= kMaxInputs + kNumOutputs) {
            return false;
        }
        PluginTensorDesc const* pointers[kMaxInputs + kNumOutputs]{};
        for (int32_t i = 0; i <= position; ++i) {
            pointers[i] = &tensors[i];
        }
        return isSupported(mAttributes, position, pointers, numInputs, numOutputs);
    }

    void configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t numInputs,
        DynamicPluginTensorDesc const* outputs, int32_t numOutputs) noexcept override {
        // The interface has no way to fail: what is wrong is logged here, and enqueue then fails.
        mRefused = true;
        mMinBatch = 1;
        mMinPixels = 1;
        Range range;
        if (inputs == nullptr || outputs == nullptr) {
            CANNY2IMAGE_ERROR("configurePlugin was called without tensors");
        } else if (checkCounts(mAttributes, numInputs, numOutputs) && makeRange(mAttributes, inputs, range)) {
            mRefused = false;
            mMinBatch = range.min.batch;
            mMinPixels = range.min.pixels;
        }
    }

    size_t getWorkspaceSize(PluginTensorDesc const* inputs, int32_t numInputs, PluginTensorDesc const* /*outputs*/,
        int32_t numOutputs) const noexcept override {
        Range range;
        if (mRefused || inputs == nullptr || !checkCounts(mAttributes, numInputs, numOutputs)
            || !makeParams(mAttributes, inputs, range.max)) {
            return 0;
        }
        range.min = range.max;
        range.min.batch = mMinBatch < range.max.batch ? mMinBatch : range.max.batch;
        range.min.pixels = mMinPixels < range.max.pixels ? mMinPixels : range.max.pixels;
        return workspaceBound(range);
    }

    int32_t enqueue(PluginTensorDesc const* inputDescs, PluginTensorDesc const* outputDescs, void const* const* inputs,
        void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        if (mRefused) {
            CANNY2IMAGE_ERROR("enqueue was called after a configuration that was refused");
            return kFailure;
        }
        return enqueueGroupNorm(mAttributes, inputDescs, outputDescs, inputs, outputs, workspace, stream);
    }

private:
    Attributes mAttributes;
    std::string mNamespace;
    bool mRefused{false};
    // The smallest problem of the profile, as configurePlugin told; getWorkspaceSize is told the largest alone.
    int64_t mMinBatch{1};
    int64_t mMinPixels{1};
};

class GroupNormCreator final : public nvinfer1::IPluginCreator {
public:
    char const* getPluginName() const noexcept override { return kPluginName; }
    char const* getPluginVersion() const noexcept override { return kPluginVersion; }
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return declaredFields(); }
    char const* getPluginNamespace() const noexcept override { return mNamespace.c_str(); }

    void setPluginNamespace(char const* space) noexcept override {
        guarded("setPluginNamespace", kFailure, [&] {
            mNamespace = space == nullptr ? "" : space;
            return kSuccess;
        });
    }

    nvinfer1::IPluginV2DynamicExt* createPlugin(
        char const* name, nvinfer1::PluginFieldCollection const* fields) noexcept override {
        return guarded("createPlugin", kNone, [&]() -> nvinfer1::IPluginV2DynamicExt* {
            Attributes attributes;
            if (!parseFields(fields, attributes)) {
                CANNY2IMAGE_ERROR("node '%s' was not made", name == nullptr ? "" : name);
                return nullptr;
            }
            return new GroupNormPlugin(attributes, mNamespace.c_str());
        });
    }

    nvinfer1::IPluginV2DynamicExt* deserializePlugin(
        char const* name, void const* data, size_t size) noexcept override {
        return guarded("deserializePlugin", kNone, [&]() -> nvinfer1::IPluginV2DynamicExt* {
            Attributes attributes;
            if (!fromState(data, size, attributes)) {
                CANNY2IMAGE_ERROR("node '%s' was not restored", name == nullptr ? "" : name);
                return nullptr;
            }
            return new GroupNormPlugin(attributes, mNamespace.c_str());
        });
    }

private:
    static constexpr nvinfer1::IPluginV2DynamicExt* kNone = nullptr;
    std::string mNamespace{kPluginNamespace};
};

GroupNormCreator& creator() {
    static GroupNormCreator instance;
    return instance;
}

}  // namespace

}  // namespace canny2image

CANNY2IMAGE_EXPORT nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& count) {
    static nvinfer1::IPluginCreator* const creators[] = {&canny2image::creator()};
    count = 1;
    return creators;
}

int32_t canny2imageRegister() noexcept {
    using namespace canny2image;
    return registerOnce(creator(), [](nvinfer1::IPluginRegistry& registry) {
        return registry.getPluginCreator(kPluginName, kPluginVersion, kPluginNamespace) != nullptr;
    });
}
