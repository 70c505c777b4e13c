// Drives a built plugin library through TensorRT's C++ interface, with the real headers and without TensorRT's
// libraries: the few functions of theirs that the plugin looks up are stood in for here.
//
//     host_check LIBRARY [--no-gpu]
//
// Fields, formats, configuration, serialising, cloning and every error path need no GPU; enqueue, in a captured CUDA
// graph and against a reference in double precision, does. Exits with 0 where everything holds. build.sh --host-check
// builds it; CANNY2IMAGE_NO_CUDA leaves out what needs the CUDA runtime's library.

#include "tensorrt_common.h"

#ifndef CANNY2IMAGE_NO_CUDA
#include <cuda_fp16.h>
#if NV_TENSORRT_MAJOR >= 10
#include <cuda_bf16.h>
#endif
#endif

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::TensorFormat;
using Dims = nvinfer1::Dims;
using Tensor = nvinfer1::PluginTensorDesc;
using Tensors = std::vector<Tensor>;
using Type = nvinfer1::DataType;
using Bytes = std::vector<uint8_t>;

// ---- Counting

int64_t checks = 0;
int64_t failures = 0;

void check(bool good, char const* what, int line, std::string const& detail = "") {
    ++checks;
    if (!good) {
        ++failures;
        std::printf("FAILED line %d: %s %s\n", line, what, detail.c_str());
    }
}
#define CHECK(condition) check((condition), #condition, __LINE__)
#define CHECK_WITH(condition, detail) check((condition), #condition, __LINE__, (detail))

// ---- What TensorRT's libraries would be

class Logger final : public nvinfer1::ILogger {
public:
    void log(Severity severity, char const* text) noexcept override {
        if (severity == Severity::kERROR || severity == Severity::kINTERNAL_ERROR) {
            errors.emplace_back(text);
        }
    }
    std::vector<std::string> errors;
};

Logger processLogger;

#if NV_TENSORRT_MAJOR >= 10
using Creator = nvinfer1::IPluginCreatorV3One;
using BaseCreator = nvinfer1::IPluginCreatorInterface;
#else
using Creator = nvinfer1::IPluginCreator;
using BaseCreator = nvinfer1::IPluginCreator;
#endif

// TensorRT 10 still has the functions of the older creators, marked as deprecated, and they are pure.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
class Registry final : public nvinfer1::IPluginRegistry {
public:
    ~Registry() noexcept override = default;

    bool registerCreator(BaseCreator& creator, char const* space) noexcept override {
        creators.emplace_back(&creator, space);
        return accepts;
    }
    bool deregisterCreator(BaseCreator const& /*creator*/) noexcept override { return false; }

#if NV_TENSORRT_MAJOR >= 10
    BaseCreator* const* getAllCreators(int32_t* /*count*/) const noexcept override { return nullptr; }
    BaseCreator* const* getAllCreatorsRecursive(int32_t* /*count*/) noexcept override { return nullptr; }
    BaseCreator* getCreator(char const* name, char const* version, char const* space) noexcept override {
        return find(name, version, space);
    }
    nvinfer1::IPluginResource* acquirePluginResource(
        char const* /*key*/, nvinfer1::IPluginResource* /*resource*/) noexcept override {
        return nullptr;
    }
    int32_t releasePluginResource(char const* /*key*/) noexcept override { return 1; }
#endif
#if NV_TENSORRT_MAJOR == 10
    bool registerCreator(nvinfer1::IPluginCreator& /*creator*/, char const* /*space*/) noexcept override {
        return false;
    }
    bool deregisterCreator(nvinfer1::IPluginCreator const& /*creator*/) noexcept override { return false; }
#endif
#if NV_TENSORRT_MAJOR <= 10
    nvinfer1::IPluginCreator* const* getPluginCreatorList(int32_t* /*count*/) const noexcept override {
        return nullptr;
    }
    nvinfer1::IPluginCreator* getPluginCreator(
        char const* name, char const* version, char const* space) noexcept override {
#if NV_TENSORRT_MAJOR == 10
        static_cast<void>(name);
        static_cast<void>(version);
        static_cast<void>(space);
        return nullptr;
#else
        return find(name, version, space);
#endif
    }
#endif

    void setErrorRecorder(nvinfer1::IErrorRecorder* /*recorder*/) noexcept override {}
    nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
    bool isParentSearchEnabled() const override { return false; }
    void setParentSearchEnabled(bool /*enabled*/) override {}
    PluginLibraryHandle loadLibrary(char const* /*path*/) noexcept override { return nullptr; }
    void deregisterLibrary(PluginLibraryHandle /*handle*/) noexcept override {}

    std::vector<std::pair<BaseCreator*, std::string>> creators;
    bool accepts{true};

private:
    BaseCreator* find(char const* name, char const* version, char const* space) const {
        for (auto const& entry : creators) {
            auto* const creator = static_cast<Creator*>(entry.first);
            if (entry.second == space && std::strcmp(creator->getPluginName(), name) == 0
                && std::strcmp(creator->getPluginVersion(), version) == 0) {
                return entry.first;
            }
        }
        return nullptr;
    }
};
#pragma GCC diagnostic pop

Registry processRegistry;
int32_t libraryVersion = NV_TENSORRT_VERSION;

class Finder final : public nvinfer1::ILoggerFinder {
public:
    nvinfer1::ILogger* findLogger() override {
        if (throws) {
            throw std::runtime_error("no logger today");
        }
        return &logger;
    }
    Logger logger;
    bool throws{false};
};

}  // namespace

extern "C" nvinfer1::IPluginRegistry* getPluginRegistry() noexcept { return &processRegistry; }
extern "C" nvinfer1::ILogger* getLogger() noexcept { return &processLogger; }
extern "C" int32_t getInferLibVersion() noexcept { return libraryVersion; }

namespace {

// A dimension known at build time, or (negative) one that is not.
class Dimension final : public nvinfer1::IDimensionExpr {
public:
    explicit Dimension(int64_t size) : mValue(size) { mImpl = &mValue; }

private:
    class Value final : public nvinfer1::apiv::VDimensionExpr {
    public:
        explicit Value(int64_t size) : mSize(size) {}
        bool isConstant() const override { return mSize >= 0; }
#if NV_TENSORRT_MAJOR >= 10
        int64_t getConstantValue() const override { return mSize; }
        bool isSizeTensor() const override { return false; }
#else
        int32_t getConstantValue() const override { return static_cast<int32_t>(mSize); }
#endif

    private:
        int64_t mSize;
    };
    Value mValue;
};

// The operator builds no expressions, so a builder without an implementation shows that it asks for none.
class NoBuilder final : public nvinfer1::IExprBuilder {
public:
    NoBuilder() { mImpl = nullptr; }
};

bool errorLogged(char const* part) {
    bool found = false;
    for (std::string const& error : processLogger.errors) {
        found = found || error.find(part) != std::string::npos;
    }
    return found;
}

// ---- One way to call either interface

Dims makeDims(std::vector<int64_t> const& sizes) {
    Dims dims{};
    dims.nbDims = static_cast<int32_t>(sizes.size());
    for (size_t i = 0; i < sizes.size(); ++i) {
        dims.d[i] = static_cast<std::remove_reference_t<decltype(dims.d[0])>>(sizes[i]);
    }
    return dims;
}

Tensor makeTensor(std::vector<int64_t> const& sizes, Type type, TensorFormat format = TensorFormat::kLINEAR) {
    Tensor tensor{};
    tensor.dims = makeDims(sizes);
    tensor.type = type;
    tensor.format = format;
    tensor.scale = 1.0F;
    return tensor;
}

DynamicPluginTensorDesc makeDynamic(Tensor const& smallest, Tensor const& largest) {
    DynamicPluginTensorDesc dynamic{};
    dynamic.desc = largest;
    for (int32_t i = 0; i < largest.dims.nbDims; ++i) {
        if (smallest.dims.d[i] != largest.dims.d[i]) {
            dynamic.desc.dims.d[i] = -1;
        }
    }
    dynamic.min = smallest.dims;
    dynamic.max = largest.dims;
#if NV_TENSORRT_MAJOR >= 10
    dynamic.opt = largest.dims;
#endif
    return dynamic;
}

std::vector<DynamicPluginTensorDesc> makeDynamics(Tensors const& smallest, Tensors const& largest) {
    std::vector<DynamicPluginTensorDesc> dynamics;
    for (size_t i = 0; i < largest.size(); ++i) {
        dynamics.push_back(makeDynamic(smallest[i], largest[i]));
    }
    return dynamics;
}

Creator* creator = nullptr;

#if NV_TENSORRT_MAJOR >= 10

class Operator {
public:
    explicit Operator(nvinfer1::IPluginV3* plugin) : mPlugin(plugin) {
        if (mPlugin != nullptr) {
            using Capability = nvinfer1::PluginCapabilityType;
            mCore = static_cast<nvinfer1::IPluginV3OneCore*>(mPlugin->getCapabilityInterface(Capability::kCORE));
            mBuild = static_cast<nvinfer1::IPluginV3OneBuild*>(mPlugin->getCapabilityInterface(Capability::kBUILD));
            mRun = static_cast<nvinfer1::IPluginV3OneRuntime*>(mPlugin->getCapabilityInterface(Capability::kRUNTIME));
        }
    }

    static Operator create(PluginFieldCollection const* fields) {
        return Operator(creator->createPlugin("node", fields, nvinfer1::TensorRTPhase::kBUILD));
    }
    static Operator restore(Bytes const& bytes) {
        PluginField const field("state", bytes.data(), PluginFieldType::kUNKNOWN, static_cast<int32_t>(bytes.size()));
        PluginFieldCollection const fields{1, &field};
        return Operator(creator->createPlugin("node", &fields, nvinfer1::TensorRTPhase::kRUNTIME));
    }

    explicit operator bool() const { return mPlugin != nullptr; }
    char const* name() const { return mCore->getPluginName(); }
    char const* version() const { return mCore->getPluginVersion(); }
    char const* space() const { return mCore->getPluginNamespace(); }
    int32_t numOutputs() const { return mBuild->getNbOutputs(); }
    std::string timingCacheID() { return mBuild->getTimingCacheID(); }

    Bytes serialise() {
        PluginFieldCollection const* const fields = mRun->getFieldsToSerialize();
        CHECK(fields != nullptr && fields->nbFields == 1 && std::strcmp(fields->fields[0].name, "state") == 0);
        auto const* const data = static_cast<uint8_t const*>(fields->fields[0].data);
        return Bytes(data, data + fields->fields[0].length);
    }
    Operator clone() { return Operator(mPlugin->clone()); }
    Operator attach() { return Operator(mRun->attachToContext(nullptr)); }

    bool supports(int32_t position, Tensors const& tensors, int32_t numInputs, int32_t numOutputs = 1) {
        std::vector<DynamicPluginTensorDesc> const dynamics = makeDynamics(tensors, tensors);
        return mBuild->supportsFormatCombination(position, dynamics.data(), numInputs, numOutputs);
    }
    bool outputType(Type& type, std::vector<Type> const& inputs) {
        return mBuild->getOutputDataTypes(&type, 1, inputs.data(), static_cast<int32_t>(inputs.size())) == 0;
    }
    bool outputShape(nvinfer1::DimsExprs& output, std::vector<nvinfer1::DimsExprs> const& inputs) {
        NoBuilder builder;
        int32_t const count = static_cast<int32_t>(inputs.size());
        return mBuild->getOutputShapes(inputs.data(), count, nullptr, 0, &output, 1, builder) == 0;
    }
    bool configure(Tensors const& smallest, Tensors const& largest) {
        auto const inputs = makeDynamics(smallest, largest);
        DynamicPluginTensorDesc const output = makeDynamic(smallest[0], largest[0]);
        return mBuild->configurePlugin(inputs.data(), static_cast<int32_t>(inputs.size()), &output, 1) == 0;
    }
    size_t workspace(Tensors const& smallest, Tensors const& largest) {
        auto const inputs = makeDynamics(smallest, largest);
        DynamicPluginTensorDesc const output = makeDynamic(smallest[0], largest[0]);
        return mBuild->getWorkspaceSize(inputs.data(), static_cast<int32_t>(inputs.size()), &output, 1);
    }
    bool shapeChange(Tensors const& inputs, Tensor const& output) {
        return mRun->onShapeChange(inputs.data(), static_cast<int32_t>(inputs.size()), &output, 1) == 0;
    }
    bool enqueue(Tensors const& inputs, Tensor const& output, void const* const* data, void* const* outputs,
        void* workspace, cudaStream_t stream) {
        return mRun->enqueue(inputs.data(), &output, data, outputs, workspace, stream) == 0;
    }

private:
    std::unique_ptr<nvinfer1::IPluginV3> mPlugin;
    nvinfer1::IPluginV3OneCore* mCore{nullptr};
    nvinfer1::IPluginV3OneBuild* mBuild{nullptr};
    nvinfer1::IPluginV3OneRuntime* mRun{nullptr};
};

#else

class Operator {
public:
    // The creator's return type is deprecated; only what it is here is named.
    template <typename Plugin>
    explicit Operator(Plugin* plugin) : mPlugin(static_cast<nvinfer1::IPluginV2DynamicExt*>(plugin)) {}

    static Operator create(PluginFieldCollection const* fields) {
        return Operator(creator->createPlugin("node", fields));
    }
    static Operator restore(Bytes const& bytes) {
        return Operator(creator->deserializePlugin("node", bytes.data(), bytes.size()));
    }

    explicit operator bool() const { return mPlugin != nullptr; }
    char const* name() const { return mPlugin->getPluginType(); }
    char const* version() const { return mPlugin->getPluginVersion(); }
    char const* space() const { return mPlugin->getPluginNamespace(); }
    int32_t numOutputs() const { return mPlugin->getNbOutputs(); }

    Bytes serialise() {
        Bytes bytes(mPlugin->getSerializationSize() + 1, 0xA5);
        mPlugin->serialize(bytes.data());
        CHECK(bytes.back() == 0xA5);  // it wrote no more than it said
        bytes.pop_back();
        return bytes;
    }
    Operator clone() { return Operator(mPlugin->clone()); }
    Operator attach() {
        mPlugin->attachToContext(nullptr, nullptr, nullptr);
        CHECK(mPlugin->initialize() == 0);
        return clone();
    }

    bool supports(int32_t position, Tensors const& tensors, int32_t numInputs, int32_t numOutputs = 1) {
        return mPlugin->supportsFormatCombination(position, tensors.data(), numInputs, numOutputs);
    }
    // The functions that have no way to fail have to log what is wrong.
    bool outputType(Type& type, std::vector<Type> const& inputs) {
        size_t const before = processLogger.errors.size();
        type = mPlugin->getOutputDataType(0, inputs.data(), static_cast<int32_t>(inputs.size()));
        return processLogger.errors.size() == before;
    }
    bool outputShape(nvinfer1::DimsExprs& output, std::vector<nvinfer1::DimsExprs> const& inputs) {
        NoBuilder builder;
        output = mPlugin->getOutputDimensions(0, inputs.data(), static_cast<int32_t>(inputs.size()), builder);
        return output.nbDims >= 0;
    }
    bool configure(Tensors const& smallest, Tensors const& largest) {
        size_t const before = processLogger.errors.size();
        auto const inputs = makeDynamics(smallest, largest);
        DynamicPluginTensorDesc const output = makeDynamic(smallest[0], largest[0]);
        mPlugin->configurePlugin(inputs.data(), static_cast<int32_t>(inputs.size()), &output, 1);
        return processLogger.errors.size() == before;
    }
    size_t workspace(Tensors const& smallest, Tensors const& largest) {
        configure(smallest, largest);
        return mPlugin->getWorkspaceSize(largest.data(), static_cast<int32_t>(largest.size()), &largest[0], 1);
    }
    bool shapeChange(Tensors const& /*inputs*/, Tensor const& /*output*/) { return true; }
    bool enqueue(Tensors const& inputs, Tensor const& output, void const* const* data, void* const* outputs,
        void* workspace, cudaStream_t stream) {
        return mPlugin->enqueue(inputs.data(), &output, data, outputs, workspace, stream) == 0;
    }

private:
    struct Destroy {
        void operator()(nvinfer1::IPluginV2DynamicExt* plugin) const { plugin->destroy(); }
    };
    std::unique_ptr<nvinfer1::IPluginV2DynamicExt, Destroy> mPlugin;
};

#endif

// ---- What the checks work on

struct Values {
    int32_t groups{32};
    float epsilon{1e-5F};
    int32_t activation{1};
    int32_t hasBias{1};

    std::vector<PluginField> fields() const {
        return {PluginField("groups", &groups, PluginFieldType::kINT32, 1),
            PluginField("epsilon", &epsilon, PluginFieldType::kFLOAT32, 1),
            PluginField("activation", &activation, PluginFieldType::kINT32, 1),
            PluginField("has_bias", &hasBias, PluginFieldType::kINT32, 1)};
    }
};

Operator createFrom(std::vector<PluginField> const& fields) {
    PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
    return Operator::create(&collection);
}

Operator createFrom(Values const& values) { return createFrom(values.fields()); }

struct Choice {
    Type type;
    TensorFormat format;
};

// The wanted formats of x, written down apart from the library's own table.
std::vector<Choice> wantedFormats() {
    std::vector<Choice> formats{{Type::kFLOAT, TensorFormat::kLINEAR}, {Type::kHALF, TensorFormat::kLINEAR},
        {Type::kHALF, TensorFormat::kHWC8}};
#if NV_TENSORRT_MAJOR >= 10
    formats.push_back({Type::kBF16, TensorFormat::kLINEAR});
    formats.push_back({Type::kBF16, TensorFormat::kHWC8});
#endif
    return formats;
}

Tensors makeInputs(std::vector<int64_t> const& x, Choice choice, Type parameterType, Type biasType, bool hasBias) {
    Tensors inputs{makeTensor(x, choice.type, choice.format), makeTensor({x[1]}, parameterType),
        makeTensor({x[1]}, parameterType)};
    if (hasBias) {
        inputs.push_back(makeTensor({x[0], x[1]}, biasType));
    }
    return inputs;
}

Tensors makeInputs(std::vector<int64_t> const& x, bool hasBias = true) {
    return makeInputs(x, {Type::kHALF, TensorFormat::kLINEAR}, Type::kHALF, Type::kHALF, hasBias);
}

// ---- Checks that need no GPU

void checkRegistration(void* library, Finder& finder) {
    auto* const enlist = reinterpret_cast<int32_t (*)()>(dlsym(library, "canny2imageRegister"));
    auto* const facts = reinterpret_cast<char const* (*)()>(dlsym(library, "canny2imageFacts"));
    auto* const setFinder = reinterpret_cast<void (*)(nvinfer1::ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
#if NV_TENSORRT_MAJOR >= 10
    auto* const list = reinterpret_cast<BaseCreator* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
#else
    auto* const list = reinterpret_cast<BaseCreator* const* (*)(int32_t&)>(dlsym(library, "getPluginCreators"));
#endif
    if (enlist == nullptr || facts == nullptr || setFinder == nullptr || list == nullptr) {
        throw std::runtime_error("the library lacks one of the functions that it has to export");
    }
    std::printf("%s\n", facts());

    libraryVersion = NV_TENSORRT_MAJOR == 8 ? 101303 : 8601;
    CHECK(enlist() == 1 && processRegistry.creators.empty() && errorLogged("the process has loaded TensorRT"));
    libraryVersion = NV_TENSORRT_VERSION;
    processRegistry.accepts = false;
    CHECK(enlist() == 2 && errorLogged("refused to register"));
    processRegistry.accepts = true;
    processRegistry.creators.clear();
    CHECK(enlist() == 0);
    CHECK(enlist() == 0);
    CHECK(processRegistry.creators.size() == 1 && processRegistry.creators[0].second == "canny2image");

    int32_t count = 0;
    BaseCreator* const* const creators = list(count);
    CHECK(count == 1 && creators != nullptr && creators[0] == processRegistry.creators.at(0).first);
    creator = static_cast<Creator*>(creators[0]);
    CHECK(std::string(creator->getPluginName()) == "GroupNormSiLU");
    CHECK(std::string(creator->getPluginVersion()) == "1");
    CHECK(std::string(creator->getPluginNamespace()) == "canny2image");

    Values wrong;
    wrong.groups = 0;
    setFinder(&finder);
    CHECK(!createFrom(wrong) && !finder.logger.errors.empty());
    finder.throws = true;
    std::printf("(two lines of the plugin follow: its logger's finder throws)\n");
    std::fflush(stdout);
    CHECK(!createFrom(wrong));
    setFinder(nullptr);
    processLogger.errors.clear();
    CHECK(!createFrom(wrong) && errorLogged("groups is 0"));
}

void checkDeclaredFields() {
    PluginFieldCollection const* const fields = creator->getFieldNames();
    std::vector<PluginField> const wanted = Values().fields();
    CHECK(fields != nullptr && fields->nbFields == static_cast<int32_t>(wanted.size()));
    for (size_t i = 0; i < wanted.size(); ++i) {
        CHECK(std::strcmp(fields->fields[i].name, wanted[i].name) == 0);
        CHECK(fields->fields[i].type == wanted[i].type);
    }
}

// `change` must make the plugin refuse, with `reason` logged.
void checkRefused(std::function<void(std::vector<PluginField>&, Values&)> const& change, char const* reason) {
    Values values;
    std::vector<PluginField> fields = values.fields();
    change(fields, values);
    processLogger.errors.clear();
    CHECK_WITH(!createFrom(fields), reason);
    CHECK_WITH(errorLogged(reason), reason);
}

void checkBadFields() {
    using Fields = std::vector<PluginField>;
    static int32_t const kTwo[2] = {1, 1};
    static double const kDouble = 1e-5;
    for (size_t i = 0; i < Values().fields().size(); ++i) {
        std::string const missing = std::string("attribute ") + Values().fields()[i].name + " is missing";
        checkRefused([&](Fields& f, Values&) { f.erase(f.begin() + static_cast<int64_t>(i)); }, missing.c_str());
        checkRefused([&](Fields& f, Values&) { f.push_back(f[i]); }, "is given twice");
        checkRefused([&](Fields& f, Values&) { f[i].data = nullptr; }, "must be one");
        checkRefused([&](Fields& f, Values&) { f[i].type = PluginFieldType::kCHAR; }, "must be one");
        checkRefused([&](Fields& f, Values&) { f[i].length = 2; }, "must be one");
    }
    checkRefused([](Fields& f, Values&) { f.clear(); }, "is missing");
    checkRefused([](Fields& f, Values&) { f[0].data = kTwo, f[0].length = 2; }, "groups must be one int32");
    checkRefused([](Fields& f, Values&) { f[1].data = &kDouble, f[1].type = PluginFieldType::kFLOAT64; },
        "epsilon must be one float32");
    checkRefused([](Fields& f, Values&) { f[0].name = "group"; }, "'group' is unknown");
    checkRefused([](Fields& f, Values&) { f[0].name = nullptr; }, "'' is unknown");
    checkRefused([](Fields&, Values& v) { v.groups = 0; }, "groups is 0");
    checkRefused([](Fields&, Values& v) { v.groups = -4; }, "groups is -4");
    checkRefused([](Fields&, Values& v) { v.epsilon = -1e-5F; }, "epsilon is");
    checkRefused([](Fields&, Values& v) { v.epsilon = std::numeric_limits<float>::quiet_NaN(); }, "epsilon is");
    checkRefused([](Fields&, Values& v) { v.epsilon = std::numeric_limits<float>::infinity(); }, "epsilon is");
    checkRefused([](Fields&, Values& v) { v.activation = 2; }, "activation is 2");
    checkRefused([](Fields&, Values& v) { v.activation = -1; }, "activation is -1");
    checkRefused([](Fields&, Values& v) { v.hasBias = 2; }, "has_bias is 2");
    processLogger.errors.clear();
    CHECK(!Operator::create(nullptr) && errorLogged("no attributes"));
}

void checkState() {
    std::vector<Bytes> states;
    for (int32_t i = 0; i < 16; ++i) {
        Values const values{i & 1 ? 32 : 8, i & 2 ? 1e-5F : 1e-6F, i & 4 ? 1 : 0, i & 8 ? 1 : 0};
        Operator original = createFrom(values);
        CHECK(static_cast<bool>(original));
        Bytes const bytes = original.serialise();
        for (Bytes const& other : states) {
            CHECK(other != bytes);  // no attribute is left out
        }
        states.push_back(bytes);
        Operator restored = Operator::restore(bytes);
        CHECK(static_cast<bool>(restored) && restored.serialise() == bytes);
        Operator cloned = restored.clone();
        Operator attached = cloned.attach();
        for (Operator* each : {&original, &restored, &cloned, &attached}) {
            CHECK(each->serialise() == bytes);
            CHECK(std::string(each->name()) == "GroupNormSiLU" && std::string(each->version()) == "1");
            CHECK(std::string(each->space()) == "canny2image" && each->numOutputs() == 1);
#if NV_TENSORRT_MAJOR >= 10
            CHECK(each->timingCacheID() == original.timingCacheID());
#endif
        }
    }
    auto const refused = [&](Bytes const& bytes, char const* reason) {
        processLogger.errors.clear();
        CHECK_WITH(!Operator::restore(bytes), reason);
        CHECK_WITH(errorLogged(reason), reason);
    };
    Bytes const good = states.back();
    for (size_t size = 0; size < good.size(); ++size) {
        refused(Bytes(good.begin(), good.begin() + static_cast<int64_t>(size)), "build the engine again");
    }
    Bytes longer = good;
    longer.push_back(0);
    refused(longer, "build the engine again");
    for (size_t i = 0; i < 12; ++i) {  // mark, version, length
        Bytes damaged = good;
        damaged[i] ^= 0xFF;
        refused(damaged, "damaged or of another version");
    }
    for (size_t i = 12; i < good.size(); i += 4) {  // attributes: all ones is no legal value of any
        Bytes damaged = good;
        std::fill_n(damaged.begin() + static_cast<int64_t>(i), 4, uint8_t{0xFF});
        refused(damaged, "attribute");
    }
}

bool isWanted(int32_t position, Tensors const& tensors, bool hasBias) {
    Tensor const& tensor = tensors[static_cast<size_t>(position)];
    Tensor const& x = tensors[0];
    if (position == 0) {
        bool found = false;
        for (Choice const& choice : wantedFormats()) {
            found = found || (choice.type == tensor.type && choice.format == tensor.format);
        }
        return found;
    }
    if (position == (hasBias ? 4 : 3)) {
        return tensor.type == x.type && tensor.format == x.format;
    }
    bool const typeFits = tensor.type == Type::kFLOAT || tensor.type == x.type;
    return tensor.format == TensorFormat::kLINEAR && typeFits && (position != 2 || tensor.type == tensors[1].type);
}

// Every type and format at `position`, each accepted one followed through the positions after it.
int64_t followFormats(Operator& plugin, Tensors& tensors, int32_t position, bool hasBias) {
    int32_t const numInputs = hasBias ? 4 : 3;
    if (position > numInputs) {
        return 1;
    }
    int64_t combinations = 0;
    Tensor& tensor = tensors[static_cast<size_t>(position)];
    for (int32_t type = 0; type < nvinfer1::EnumMax<Type>(); ++type) {
        for (int32_t format = 0; format < nvinfer1::EnumMax<TensorFormat>(); ++format) {
            tensor.type = static_cast<Type>(type);
            tensor.format = static_cast<TensorFormat>(format);
            bool const supported = plugin.supports(position, tensors, numInputs);
            CHECK(supported == isWanted(position, tensors, hasBias));
            combinations += supported ? followFormats(plugin, tensors, position + 1, hasBias) : 0;
        }
    }
    return combinations;
}

void checkFormats() {
    for (bool hasBias : {false, true}) {
        Values values;
        values.hasBias = hasBias ? 1 : 0;
        Operator plugin = createFrom(values);
        Tensors tensors = makeInputs({2, 320, 32, 48}, hasBias);
        tensors.push_back(tensors[0]);
        int64_t const found = followFormats(plugin, tensors, 0, hasBias);
        // FP32 has one choice a parameter, the others two: gamma with beta, and the bias.
        int64_t const others = static_cast<int64_t>(wantedFormats().size()) - 1;
        CHECK(found == 1 + others * (hasBias ? 4 : 2));
        std::printf(
            "formats %s bias: %lld combinations\n", hasBias ? "with" : "without", static_cast<long long>(found));

        int32_t const numInputs = hasBias ? 4 : 3;
        Tensors good = makeInputs({2, 320, 32, 48}, hasBias);
        good.push_back(good[0]);
        CHECK(plugin.supports(0, good, numInputs));
        CHECK(!plugin.supports(0, good, numInputs - 1) && !plugin.supports(0, good, numInputs, 2));
        CHECK(!plugin.supports(-1, good, numInputs) && !plugin.supports(numInputs + 1, good, numInputs));
        for (int32_t rank : {0, 3, 5}) {  // 0: not known yet
            Tensors image = good;
            image[0].format = TensorFormat::kHWC8;
            image[0].dims.nbDims = rank;
            CHECK(plugin.supports(0, image, numInputs) == (rank == 0));
        }
    }
}

void checkShapes() {
    Operator plugin = createFrom(Values());
    Dimension const batch(-1);
    Dimension const channels(320);
    Dimension const odd(321);
    Dimension const size(24);
    auto const shape = [&](nvinfer1::IDimensionExpr const* c, int32_t rank) {
        nvinfer1::DimsExprs dims{};
        dims.nbDims = rank;
        for (int32_t i = 0; i < rank; ++i) {
            dims.d[i] = i == 0 ? &batch : i == 1 ? c : &size;
        }
        return std::vector<nvinfer1::DimsExprs>(4, dims);
    };
    nvinfer1::DimsExprs output{};
    CHECK(plugin.outputShape(output, shape(&channels, 4)) && output.nbDims == 4);
    CHECK(output.d[0] == &batch && output.d[1] == &channels && output.d[3] == &size);
    CHECK(plugin.outputShape(output, shape(&batch, 4)));  // channels not known yet
    processLogger.errors.clear();
    CHECK(!plugin.outputShape(output, shape(&odd, 4)) && errorLogged("321 channels, which 32 groups do not divide"));
    CHECK(!plugin.outputShape(output, shape(&channels, 2)) && errorLogged("2 dimensions"));
    auto three = shape(&channels, 4);
    three.pop_back();
    CHECK(!plugin.outputShape(output, three) && errorLogged("3 inputs and 1 outputs"));

    Type type{};
    for (Choice const& choice : wantedFormats()) {
        CHECK(plugin.outputType(type, std::vector<Type>(4, choice.type)) && type == choice.type);
    }
    processLogger.errors.clear();
    CHECK(!plugin.outputType(type, std::vector<Type>(3, Type::kHALF)) && errorLogged("3 inputs"));
}

void checkConfigure() {
    Operator plugin = createFrom(Values());
    auto const refused = [&](Tensors const& smallest, Tensors const& largest, char const* reason) {
        processLogger.errors.clear();
        CHECK_WITH(!plugin.configure(smallest, largest), reason);
        CHECK_WITH(errorLogged(reason), reason);
        CHECK_WITH(plugin.workspace(smallest, largest) == 0, reason);
    };
    Tensors const good = makeInputs({2, 320, 32, 48});
    processLogger.errors.clear();
    CHECK(plugin.configure(good, good));
    CHECK(plugin.configure(makeInputs({1, 320, 8, 8}), makeInputs({8, 320, 64, 64})));
    CHECK(plugin.configure(makeInputs({2, 320, 1536}), makeInputs({2, 320, 1536})));
    CHECK(plugin.configure(makeInputs({2, 320, 4, 4, 4}), makeInputs({2, 320, 4, 4, 4})));
    CHECK_WITH(processLogger.errors.empty(), processLogger.errors.empty() ? "" : processLogger.errors[0]);

    Tensors bad = makeInputs({2, 330, 32, 48});
    refused(bad, bad, "330 channels, which 32 groups do not divide");
    bad = makeInputs({2, 320});
    refused(bad, bad, "2 dimensions");
    bad = Tensors(good.begin(), good.end() - 1);
    refused(bad, bad, "3 inputs and 1 outputs");
    bad = good;
    bad[0].type = Type::kINT32;
    refused(bad, bad, "x has type");
    bad = makeInputs({2, 320, 1536});
    bad[0].format = TensorFormat::kHWC8;
    refused(bad, bad, "HWC8");
    bad = good;
    bad[1].type = Type::kFLOAT;
    refused(bad, bad, "gamma and beta must be of one type");
    for (size_t i : {1U, 2U, 3U}) {
        char const* const names[] = {"x", "gamma", "beta", "channel_bias"};
        bad = good;
        bad[i].dims.d[bad[i].dims.nbDims - 1] = 319;
        refused(bad, bad, names[i]);
        bad = good;
        bad[i].dims.nbDims = 4;
        refused(bad, bad, names[i]);
        bad = good;
        bad[i].type = Type::kINT8;
        refused(bad, bad, names[i]);
        bad = good;
        bad[i].format = TensorFormat::kCHW32;
        refused(bad, bad, names[i]);
    }
    bad = good;
    bad[3].dims.d[0] = 1;
    refused(bad, bad, "channel_bias");  // it is not broadcast over the batch
    refused(makeInputs({2, 64, 32, 48}), good, "channels must be fixed");
    bad = good;
    bad[0].dims.d[2] = -1;
    refused(bad, bad, "dimension 2 of x is not known");
}

// The promise made for a profile has to cover every shape of it.
void checkWorkspace() {
    Values values;
    values.groups = 8;
    std::mt19937 random(2946901);
    for (Choice const& choice : wantedFormats()) {
        for (int64_t channels : {8, 40, 320, 1280}) {
            Operator plugin = createFrom(values);
            auto const inputs = [&](int64_t n, int64_t h, int64_t w) {
                return makeInputs({n, channels, h, w}, choice, Type::kFLOAT, Type::kFLOAT, true);
            };
            size_t const bound = plugin.workspace(inputs(1, 1, 1), inputs(8, 128, 96));
            for (int32_t i = 0; i < 200; ++i) {
                int64_t const n = 1 + static_cast<int64_t>(random() % 8);
                int64_t const h = 1 + static_cast<int64_t>(random() % 128);
                int64_t const w = 1 + static_cast<int64_t>(random() % 96);
                size_t const exact = plugin.workspace(inputs(n, h, w), inputs(n, h, w));
                char text[128];
                std::snprintf(text, sizeof(text), "(%zu bytes for N %lld C %lld %lld x %lld, promised %zu)", exact,
                    static_cast<long long>(n), static_cast<long long>(channels), static_cast<long long>(h),
                    static_cast<long long>(w), bound);
                CHECK_WITH(exact <= bound, text);
            }
        }
    }
}

void checkBadEnqueue() {
    Operator plugin = createFrom(Values());
    Tensors const inputs = makeInputs({2, 320, 32, 48});
    static char memory[16];
    void const* data[] = {memory, memory, memory, memory};
    void* outputs[] = {memory};
    auto const refused = [&](Tensors const& descs, Tensor const& output, char const* reason) {
        processLogger.errors.clear();
        CHECK_WITH(!plugin.enqueue(descs, output, data, outputs, nullptr, nullptr), reason);
        CHECK_WITH(errorLogged(reason), reason);
    };
    Tensors bad = makeInputs({2, 330, 32, 48});
    refused(bad, bad[0], "330 channels");
    bad = inputs;
    bad[0].type = Type::kINT8;
    refused(bad, bad[0], "x has type");
    Tensor other = inputs[0];
    other.dims.d[3] = 47;
    refused(inputs, other, "output differs from x");
    other = inputs[0];
    other.type = Type::kFLOAT;
    refused(inputs, other, "output differs from x");
    for (size_t i = 0; i < 4; ++i) {
        data[i] = nullptr;
        refused(inputs, inputs[0], "null tensor");
        data[i] = memory;
    }
    outputs[0] = nullptr;
    refused(inputs, inputs[0], "null tensor");
    outputs[0] = memory;
    processLogger.errors.clear();
    CHECK(!plugin.enqueue(inputs, inputs[0], nullptr, outputs, nullptr, nullptr) && errorLogged("without tensors"));
    Tensors const empty = makeInputs({0, 320, 32, 48});
    CHECK(plugin.enqueue(empty, empty[0], data, outputs, nullptr, nullptr));  // nothing to do is no fault
#if NV_TENSORRT_MAJOR >= 10
    CHECK(plugin.shapeChange(inputs, inputs[0]));
    CHECK(!plugin.shapeChange(inputs, other) && errorLogged("output differs from x"));
    CHECK(!plugin.shapeChange(makeInputs({2, 330, 32, 48}), inputs[0]) && errorLogged("330 channels"));
#endif
}

// ---- Enqueue, on a GPU

#ifndef CANNY2IMAGE_NO_CUDA

void need(cudaError_t status, int line) {
    if (status != cudaSuccess) {
        throw std::runtime_error("line " + std::to_string(line) + ": " + cudaGetErrorString(status));
    }
}
#define NEED(call) need((call), __LINE__)

size_t sizeOf(Type type) { return type == Type::kFLOAT ? 4 : 2; }

void store(uint8_t* at, Type type, float value) {
    if (type == Type::kFLOAT) {
        std::memcpy(at, &value, sizeof(value));
    } else if (type == Type::kHALF) {
        __half const half = __float2half(value);
        std::memcpy(at, &half, sizeof(half));
    }
#if NV_TENSORRT_MAJOR >= 10
    else {
        __nv_bfloat16 const bfloat = __float2bfloat16(value);
        std::memcpy(at, &bfloat, sizeof(bfloat));
    }
#endif
}

float load(uint8_t const* at, Type type) {
    float value = 0.0F;
    if (type == Type::kFLOAT) {
        std::memcpy(&value, at, sizeof(value));
    } else if (type == Type::kHALF) {
        __half half;
        std::memcpy(&half, at, sizeof(half));
        value = __half2float(half);
    }
#if NV_TENSORRT_MAJOR >= 10
    else {
        __nv_bfloat16 bfloat;
        std::memcpy(&bfloat, at, sizeof(bfloat));
        value = __bfloat162float(bfloat);
    }
#endif
    return value;
}

class DeviceBuffer {
public:
    explicit DeviceBuffer(size_t size) : mSize(size) {
        NEED(cudaMalloc(&mData, size + kGuard));
        poison();
    }
    ~DeviceBuffer() { cudaFree(mData); }
    DeviceBuffer(DeviceBuffer const&) = delete;
    DeviceBuffer& operator=(DeviceBuffer const&) = delete;
    void poison() { NEED(cudaMemset(mData, kPoison, mSize + kGuard)); }  // NaN in every type
    void write(Bytes const& bytes) { NEED(cudaMemcpy(mData, bytes.data(), bytes.size(), cudaMemcpyHostToDevice)); }
    Bytes read() const {
        Bytes bytes(mSize);
        NEED(cudaMemcpy(bytes.data(), mData, mSize, cudaMemcpyDeviceToHost));
        return bytes;
    }
    // Whether what lies behind the buffer is as `poison` left it.
    bool intact() const {
        Bytes guard(kGuard);
        NEED(cudaMemcpy(guard.data(), static_cast<uint8_t*>(mData) + mSize, kGuard, cudaMemcpyDeviceToHost));
        return guard == Bytes(kGuard, kPoison);
    }
    void* data() const { return mData; }

private:
    static constexpr size_t kGuard = 256;
    static constexpr uint8_t kPoison = 0xFF;
    void* mData{nullptr};
    size_t mSize;
};

struct Problem {
    int64_t batch;
    int64_t channels;
    int64_t height;
    int64_t width;
    Values values;
    float mean;
    Choice choice;
    Type parameterType;
    Type biasType;

    int64_t pixels() const { return height * width; }
    bool padded() const { return choice.format == TensorFormat::kHWC8; }
    int64_t stride() const { return padded() ? (channels + 7) / 8 * 8 : channels; }
    int64_t elements() const { return batch * stride() * pixels(); }
    // Where element (n, c, p) lies.
    int64_t offset(int64_t n, int64_t c, int64_t p) const {
        return padded() ? (n * pixels() + p) * stride() + c : (n * channels + c) * pixels() + p;
    }
};

Bytes randomBytes(std::mt19937& random, int64_t count, Type type, float mean, float deviation) {
    std::normal_distribution<float> normal(mean, deviation);
    Bytes bytes(static_cast<size_t>(count) * sizeOf(type));
    for (size_t at = 0; at < bytes.size(); at += sizeOf(type)) {
        store(&bytes[at], type, normal(random));
    }
    return bytes;
}

double valueAt(Bytes const& bytes, Type type, int64_t index) {
    return load(&bytes[static_cast<size_t>(index) * sizeOf(type)], type);
}

// By (n, c, p).
std::vector<double> reference(Problem const& problem, std::vector<Bytes> const& inputs) {
    int64_t const perGroup = problem.channels / problem.values.groups;
    int64_t const pixels = problem.pixels();
    std::vector<double> result(static_cast<size_t>(problem.batch * problem.channels * pixels));
    for (int64_t n = 0; n < problem.batch; ++n) {
        for (int64_t first = 0; first < problem.channels; first += perGroup) {
            double* const group = &result[static_cast<size_t>((n * problem.channels + first) * pixels)];
            double sum = 0;
            for (int64_t i = 0; i < perGroup * pixels; ++i) {
                int64_t const c = first + i / pixels;
                group[i] = valueAt(inputs[0], problem.choice.type, problem.offset(n, c, i % pixels));
                group[i] += problem.values.hasBias
                    ? valueAt(inputs[3], problem.biasType, n * problem.channels + c)
                    : 0.0;
                sum += group[i];
            }
            double const count = static_cast<double>(perGroup * pixels);
            double const mean = sum / count;
            double squares = 0;
            for (int64_t i = 0; i < perGroup * pixels; ++i) {
                squares += (group[i] - mean) * (group[i] - mean);
            }
            double const scale = 1.0 / std::sqrt(squares / count + static_cast<double>(problem.values.epsilon));
            for (int64_t i = 0; i < perGroup * pixels; ++i) {
                int64_t const c = first + i / pixels;
                double const y = (group[i] - mean) * scale * valueAt(inputs[1], problem.parameterType, c)
                    + valueAt(inputs[2], problem.parameterType, c);
                group[i] = problem.values.activation == 1 ? y / (1.0 + std::exp(-y)) : y;
            }
        }
    }
    return result;
}

std::string describe(Problem const& p) {
    char text[256];
    std::snprintf(text, sizeof(text),
        "(N %lld C %lld %lld x %lld groups %d epsilon %g activation %d bias %d mean %g type %d format %d parameters "
        "%d)",
        static_cast<long long>(p.batch), static_cast<long long>(p.channels), static_cast<long long>(p.height),
        static_cast<long long>(p.width), p.values.groups, static_cast<double>(p.values.epsilon), p.values.activation,
        p.values.hasBias, static_cast<double>(p.mean), static_cast<int>(p.choice.type),
        static_cast<int>(p.choice.format), static_cast<int>(p.parameterType));
    return text;
}

// Error over what the type's rounding allows; at most 1 is right. Padding must be zero.
double worstError(Problem const& problem, Bytes const& output, std::vector<double> const& wanted) {
    // Half a unit in the last place, doubled; what FP32 arithmetic adds grows with the mean that cancels.
    double const rounding = problem.choice.type == Type::kFLOAT ? 4e-6
        : problem.choice.type == Type::kHALF                    ? 1e-3
                                                                : 8e-3;
    double const cancelled = 2e-6 * (1.0 + std::abs(static_cast<double>(problem.mean)));
    double worst = 0;
    for (int64_t n = 0; n < problem.batch; ++n) {
        for (int64_t p = 0; p < problem.pixels(); ++p) {
            for (int64_t c = 0; c < problem.stride(); ++c) {
                double const found = valueAt(output, problem.choice.type, problem.offset(n, c, p));
                if (c >= problem.channels) {
                    worst = found == 0.0 ? worst : std::numeric_limits<double>::infinity();
                    continue;
                }
                double const y = wanted[static_cast<size_t>((n * problem.channels + c) * problem.pixels() + p)];
                double const error = std::abs(found - y) / (rounding * (std::abs(y) + 0.1) + 4.0 * cancelled);
                worst = error <= worst ? worst : std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
            }
        }
    }
    return worst;
}

void requireLaunch(bool launched) {
    if (!launched) {
        throw std::runtime_error(
            processLogger.errors.empty() ? "enqueue failed, unlogged" : processLogger.errors.back());
    }
}

// Once straight, as TensorRT itself does before a capture (it also loads the kernels), then twice from one graph.
void launchAll(Operator& plugin, Tensors const& descs, void const* const* data, DeviceBuffer& output,
    DeviceBuffer& workspace, std::vector<Bytes>& results) {
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    void* const outputs[] = {output.data()};
    NEED(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    NEED(cudaDeviceSynchronize());
    requireLaunch(plugin.enqueue(descs, descs[0], data, outputs, workspace.data(), stream));
    NEED(cudaStreamSynchronize(stream));
    results.push_back(output.read());
    NEED(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    bool const launched = plugin.enqueue(descs, descs[0], data, outputs, workspace.data(), stream);
    NEED(cudaStreamEndCapture(stream, &graph));
    requireLaunch(launched);
    NEED(cudaGraphInstantiateWithFlags(&executable, graph, 0));
    for (int32_t i = 0; i < 2; ++i) {
        output.poison();
        workspace.poison();
        NEED(cudaDeviceSynchronize());
        NEED(cudaGraphLaunch(executable, stream));
        NEED(cudaStreamSynchronize(stream));
        results.push_back(output.read());
    }
    NEED(cudaGraphExecDestroy(executable));
    NEED(cudaGraphDestroy(graph));
    NEED(cudaStreamDestroy(stream));
}

double runProblem(Problem const& problem, std::mt19937& random) {
    Tensors const descs = makeInputs({problem.batch, problem.channels, problem.height, problem.width}, problem.choice,
        problem.parameterType, problem.biasType, problem.values.hasBias == 1);
    Operator built = createFrom(problem.values);
    CHECK_WITH(built.configure(descs, descs), describe(problem));
    size_t const workspaceSize = built.workspace(descs, descs);
    Operator restored = Operator::restore(built.serialise());
    Operator plugin = restored.attach();
    CHECK_WITH(plugin.shapeChange(descs, descs[0]), describe(problem));

    std::vector<Bytes> inputs{randomBytes(random, problem.elements(), problem.choice.type, problem.mean, 1.0F),
        randomBytes(random, problem.channels, problem.parameterType, 1.0F, 0.3F),
        randomBytes(random, problem.channels, problem.parameterType, 0.0F, 0.3F)};
    if (problem.values.hasBias == 1) {
        inputs.push_back(randomBytes(random, problem.batch * problem.channels, problem.biasType, 0.0F, 1.0F));
    }
    for (int64_t row = 0; row < problem.batch * problem.pixels(); ++row) {  // NaN in the padding must not matter
        for (int64_t c = problem.channels; problem.padded() && c < problem.stride(); ++c) {
            store(&inputs[0][static_cast<size_t>(row * problem.stride() + c) * sizeOf(problem.choice.type)],
                problem.choice.type, std::numeric_limits<float>::quiet_NaN());
        }
    }
    std::vector<std::unique_ptr<DeviceBuffer>> buffers;
    std::vector<void const*> data;
    for (Bytes const& bytes : inputs) {
        buffers.push_back(std::make_unique<DeviceBuffer>(bytes.size()));
        buffers.back()->write(bytes);
        data.push_back(buffers.back()->data());
    }
    DeviceBuffer output(inputs[0].size());
    DeviceBuffer workspace(workspaceSize);
    std::vector<Bytes> results;
    launchAll(plugin, descs, data.data(), output, workspace, results);
    CHECK_WITH(results[0] == results[1] && results[1] == results[2],
        describe(problem) + " the bits differ from launch to launch");
    CHECK_WITH(output.intact() && workspace.intact(), describe(problem) + " wrote past an end");
    double const error = worstError(problem, results[0], reference(problem, inputs));
    CHECK_WITH(error <= 1.0, describe(problem) + " error over bound " + std::to_string(error));
    return error;
}

void checkOnGpu() {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
        throw std::runtime_error("no CUDA device; --no-gpu leaves out what needs one");
    }
    cudaDeviceProp properties{};
    NEED(cudaGetDeviceProperties(&properties, 0));
    struct Shape {
        int64_t batch, channels, height, width;
        int32_t groups;
    };
    Shape const shapes[] = {{2, 320, 32, 48, 32}, {2, 1280, 4, 6, 32}, {1, 128, 64, 96, 32}, {3, 30, 5, 7, 6},
        {1, 8, 1, 1, 8}, {2, 36, 9, 13, 4}, {1, 2560, 8, 12, 32}, {1, 7, 33, 3, 1}};
    std::mt19937 random(2946901);
    int64_t problems = 0;
    double worst = 0;
    for (Shape const& shape : shapes) {
        for (Choice const& choice : wantedFormats()) {
            for (int32_t i = 0; i < 8; ++i) {
                Values values{shape.groups, i & 1 ? 1e-5F : 0.5F, i & 2 ? 1 : 0, i & 4 ? 1 : 0};
                // FP32 alone can tell values of mean 1000 and deviation 1 well apart.
                float const mean = choice.type == Type::kFLOAT && (i & 1) == 1 ? 1000.0F : 0.5F;
                Type const parameters = i & 1 ? Type::kFLOAT : choice.type;
                Type const bias = i & 2 ? Type::kFLOAT : choice.type;
                Problem const problem{shape.batch, shape.channels, shape.height, shape.width, values, mean, choice,
                    parameters, bias};
                worst = std::max(worst, runProblem(problem, random));
                ++problems;
            }
        }
    }
    std::printf("enqueue on %s: %lld problems, largest error over its bound %.3f\n", properties.name,
        static_cast<long long>(problems), worst);
}

#endif

int run(char const* path, bool gpu) {
    void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        throw std::runtime_error(dlerror());
    }
    Finder finder;
    checkRegistration(library, finder);
    checkDeclaredFields();
    checkBadFields();
    checkState();
    checkFormats();
    checkShapes();
    checkConfigure();
    checkWorkspace();
    checkBadEnqueue();
#ifdef CANNY2IMAGE_NO_CUDA
    if (gpu) {
        throw std::runtime_error("this program was built without CUDA; give --no-gpu");
    }
#else
    if (gpu) {
        processLogger.errors.clear();
        checkOnGpu();
    }
#endif
    std::printf("TensorRT %d.%d.%d: %lld checks, %lld failed%s\n", NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR,
        NV_TENSORRT_PATCH, static_cast<long long>(checks), static_cast<long long>(failures),
        gpu ? "" : " (without a GPU: nothing was enqueued)");
    return failures == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
    bool const gpu = argc < 3 || std::strcmp(argv[2], "--no-gpu") != 0;
    if (argc < 2 || argc > 3 || (argc == 3 && gpu)) {
        std::fprintf(stderr, "usage: host_check LIBRARY [--no-gpu]\n");
        return 2;
    }
    try {
        return run(argv[1], gpu);
    } catch (std::exception const& error) {
        std::fprintf(stderr, "host_check: error: %s\n", error.what());
        return 1;
    }
}
