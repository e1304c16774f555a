// gcompress's compressors for BytePS: compiled twice against its headers, as a worker's library and, with
// BYTEPS_BUILDING_SERVER, as a server's. The arithmetic is in the kernels (csrc/gcompress.h), whose table Python
// hands over; their arguments for every length of a partition come from Python too (methods.py). A compressor that is
// more than one kernel is called in Python (callback.py).
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "byteps/common/compressor/compressor_registry.h"
#include "gcompress.h"

namespace byteps {  // whose macros name their classes from here
namespace {

using common::DataType;
using common::compressor::Compressor;
using common::compressor::CompressorRegistry;
using common::compressor::kwargs_t;
using common::compressor::tensor_t;

const gc_kernels* kernels = nullptr;

// callback.py's: encode values to payload or, with decode, payload to values; 0 if it went well.
using Callback = int (*)(const char* spec, int64_t n, uint32_t seed, int decode, void* values, void* payload,
                         int64_t bytes);
Callback python = nullptr;

// A method: how its kernels are called with the integers that methods.py lists for it.
struct Method {
    const char* name;
    void (*encode)(const float* x, int64_t n, const int64_t* a, uint32_t seed, uint32_t* work, int64_t capacity,
                   uint8_t* payload);
    int (*decode)(const uint8_t* payload, int64_t n, const int64_t* a, float* out);
};

const Method METHODS[] = {
    {"quantize",
     [](const float* x, int64_t n, const int64_t* a, uint32_t seed, uint32_t*, int64_t, uint8_t* payload) {
         kernels->quantize_encode(1, nullptr, x, n, a[0], a[1], a[2], seed, payload);
     },
     [](const uint8_t* payload, int64_t n, const int64_t* a, float* out) {
         kernels->quantize_decode(1, nullptr, payload, n, a[0], a[1], 0, out);
         return 0;
     }},
    {"mask",
     [](const float* x, int64_t n, const int64_t* a, uint32_t, uint32_t* work, int64_t capacity, uint8_t* payload) {
         kernels->mask_encode(1, nullptr, x, n, a[0], a[1], a[2], a[3], work, capacity, payload);
     },
     [](const uint8_t* payload, int64_t n, const int64_t* a, float* out) {
         return kernels->mask_decode(1, nullptr, payload, n, a[0], a[1], a[2], 0, out);
     }},
    {"topk",
     [](const float* x, int64_t n, const int64_t* a, uint32_t, uint32_t* work, int64_t capacity, uint8_t* payload) {
         if (a[3])
             kernels->chunk_encode(nullptr, x, n, a[0], a[3], a[4], a[1], a[2], work, capacity, payload);
         else
             kernels->topk_encode(1, nullptr, x, n, a[0], a[1], a[2], work, capacity, payload);
     },
     [](const uint8_t* payload, int64_t n, const int64_t* a, float* out) {
         return kernels->topk_decode(1, nullptr, payload, n, a[0], a[1], a[2], a[4], 0, out);
     }},
    {"sign",
     [](const float* x, int64_t n, const int64_t* a, uint32_t, uint32_t*, int64_t, uint8_t* payload) {
         kernels->sign_encode(1, nullptr, x, n, a[0], a[1], payload);
     },
     [](const uint8_t* payload, int64_t n, const int64_t* a, float* out) {
         kernels->sign_decode(1, nullptr, payload, n, a[0], a[1], 0, out);
         return 0;
     }},
    {"cast",
     [](const float* x, int64_t n, const int64_t* a, uint32_t, uint32_t*, int64_t, uint8_t* payload) {
         kernels->cast_encode(1, nullptr, x, n, a[0], a[1], payload);
     },
     [](const uint8_t* payload, int64_t n, const int64_t* a, float* out) {
         kernels->cast_decode(1, nullptr, payload, n, a[0], a[1], 0, out);
         return 0;
     }},
    {"bf16",
     [](const float* x, int64_t n, const int64_t* a, uint32_t seed, uint32_t*, int64_t, uint8_t* payload) {
         kernels->bf16_encode(1, nullptr, x, n, a[0], seed, payload);
     },
     [](const uint8_t* payload, int64_t n, const int64_t*, float* out) {
         kernels->bf16_decode(1, nullptr, payload, n, 0, out);
         return 0;
     }},
    {"randomk",
     [](const float* x, int64_t n, const int64_t* a, uint32_t seed, uint32_t*, int64_t, uint8_t* payload) {
         kernels->randomk_encode(x, n, a[0], a[1], seed, payload);
     },
     [](const uint8_t* payload, int64_t n, const int64_t* a, float* out) {
         kernels->randomk_decode(payload, n, a[0], 0, out);
         return 0;
     }},
};

// What methods.py says of one length: "entries:payload bytes:workspace words:argument,argument,…".
struct Plan {
    int64_t entries = 0, bytes = 0, workspace = 0;
    int64_t arguments[8] = {0};
};

Plan find_plan(const std::string& plans, int64_t entries) {
    std::istringstream lengths(plans);
    for (std::string text; std::getline(lengths, text, ';');) {
        std::istringstream fields(text);
        Plan plan;
        char separator;
        fields >> plan.entries >> separator >> plan.bytes >> separator >> plan.workspace;
        for (int64_t* next = plan.arguments; fields >> separator >> *next;) ++next;
        if (plan.entries == entries) return plan;
    }
    BPS_CHECK(false) << "gcompress: no plan for a partition of " << entries << " entries in " << plans
                     << ": is BYTEPS_PARTITION_BYTES the same everywhere?";
    return Plan();
}

// The row of a name, or none for a compressor that is called in Python.
const Method* find_method(const std::string& name) {
    for (const Method& method : METHODS)
        if (name == method.name) return &method;
    BPS_CHECK(name == "python") << "gcompress: this library has no method " << name << ": run tools/build_byteps.py";
    return nullptr;
}

const std::string& need(const kwargs_t& kwargs, const char* name) {
    auto found = kwargs.find(name);
    BPS_CHECK(found != kwargs.end()) << "gcompress: the parameter " << name << " is missing";
    return found->second;
}

// What a worker's Python says of a tensor before each push: whether the last result was applied, and whether there is a
// gradient at all.
struct Told {
    bool applied = true, absent = false;
};
std::mutex told_mutex;
std::unordered_map<int64_t, Told> told;

#ifndef BYTEPS_BUILDING_SERVER
Told told_of(int64_t tensor) {
    std::lock_guard<std::mutex> lock(told_mutex);
    return told[tensor];
}
#endif

// One partition's encoder and decoder on one side, with its error feedback: p = x + residual is sent, what is lost is
// the next residual, once the result is known to have been applied. A p that is not finite is sent for all to see, and
// the residual stays what it was. With feedback a payload has one byte more: from a worker, whether it applied the last
// result; the server's memory follows, and all workers must say the same.
class Partition : public Compressor {
public:
    Partition(const kwargs_t& kwargs, size_t size, DataType dtype)
        : Compressor(size, dtype),
          method_(find_method(need(kwargs, "gcompress_method"))),
          spec_(need(kwargs, "gcompress_spec")),
          plan_(find_plan(need(kwargs, "gcompress_plan"), std::stoll(need(kwargs, "partition_bytes")) / 4)),
          key_(static_cast<uint32_t>(std::stoull(need(kwargs, "partition_key")))),
          tensor_(std::stoll(need(kwargs, "gcompress_tensor"))),
          decay_(std::stof(need(kwargs, "gcompress_feedback"))),
          feedback_(decay_ > 0),
          bytes_(plan_.bytes + feedback_),
          work_(plan_.workspace) {
        BPS_CHECK(kernels != nullptr && python != nullptr) << "gcompress: the kernels were not handed over";
        BPS_CHECK_EQ(dtype, common::BYTEPS_FLOAT32) << "gcompress: only float32 tensors are compressed";
        BPS_CHECK_LE(bytes_, plan_.entries * 4) << "gcompress: a payload must not be larger than its tensor";
        if (feedback_) {
            residual_.assign(plan_.entries, 0.0f);
            corrected_.resize(plan_.entries);
        }
        const char* worker = std::getenv("DMLC_WORKER_ID");
        side_ = worker ? std::atoi(worker) + 1 : 0;
    }

    tensor_t Compress(tensor_t grad) override {
        BPS_CHECK_EQ(static_cast<int64_t>(grad.size), plan_.entries * 4);
        const float* values = reinterpret_cast<const float*>(grad.data);
        uint8_t* payload = reinterpret_cast<uint8_t*>(_buf.get());
        bool remembers = feedback_;
#ifdef BYTEPS_BUILDING_SERVER
        if (!feedback_) settle(true);
        remembers = feedback_ && any(values);  // else no worker had a gradient: the residual waits
#else
        const Told said = told_of(tensor_);
        settle(said.applied);
        remembers = feedback_ && !said.absent;
        if (feedback_) payload[plan_.bytes] = said.applied;
#endif
        if (remembers) {
            for (int64_t i = 0; i < plan_.entries; ++i) corrected_[i] = values[i] + residual_[i];
            values = corrected_.data();
        }
        encode(values, payload);
        open_ = true;
        if (remembers) remember(payload);
        return {_buf.get(), static_cast<size_t>(bytes_)};
    }

    tensor_t Decompress(tensor_t compressed) override {
        BPS_CHECK_EQ(static_cast<int64_t>(compressed.size), bytes_);
#ifdef BYTEPS_BUILDING_SERVER
        const char* payload = compressed.data;
        char* out = _buf.get();
        if (feedback_) hear(payload[plan_.bytes] != 0);
#else
        std::memcpy(_buf.get(), compressed.data, compressed.size);  // it is decoded where it lies
        const char* payload = _buf.get();
        char* out = compressed.data;
#endif
        decode(reinterpret_cast<const uint8_t*>(payload), reinterpret_cast<float*>(out));
        return {out, static_cast<size_t>(plan_.entries * 4)};
    }

    // For BytePS's own error feedback and momentum around this compressor: error = corrected - decoded.
    void FastUpdateError(tensor_t error, tensor_t corrected, tensor_t compressed) override {
        float* out = reinterpret_cast<float*>(error.data);
        const float* from = reinterpret_cast<const float*>(corrected.data);
        decode(reinterpret_cast<const uint8_t*>(compressed.data), out);
        for (int64_t i = 0; i < plan_.entries; ++i) out[i] = from[i] - out[i];
    }

private:
    void encode(const float* values, uint8_t* payload) {
        if (method_)
            method_->encode(values, plan_.entries, plan_.arguments, seed(), work_.data(), plan_.workspace, payload);
        else
            call(seed(), 0, const_cast<float*>(values), payload);
    }

    void decode(const uint8_t* payload, float* out) {
        if (!method_) return call(0, 1, out, const_cast<uint8_t*>(payload));
        int result = method_->decode(payload, plan_.entries, plan_.arguments, out);
        BPS_CHECK_EQ(result, GC_OK) << "gcompress: a payload's index does not mark what " << spec_ << " keeps";
    }

    void call(uint32_t seed, int decode, float* values, uint8_t* payload) {
        int result = python(spec_.c_str(), plan_.entries, seed, decode, values, payload, plan_.bytes);
        BPS_CHECK_EQ(result, 0) << "gcompress: " << spec_ << " failed, as said above";
    }

    void remember(const uint8_t* payload) {
        sent_.resize(plan_.entries);
        decode(payload, sent_.data());
        proposed_ = true;
        for (int64_t i = 0; i < plan_.entries; ++i) {
            sent_[i] = decay_ * (corrected_[i] - sent_[i]);
            proposed_ &= static_cast<bool>(std::isfinite(sent_[i]));
        }
    }

    // The last result was applied, or not: memory follows it or stays.
    void settle(bool applied) {
        if (!open_) return;
        if (applied && proposed_) residual_.swap(sent_);
        step_ += applied;
        open_ = proposed_ = false;
    }

    // What a worker says of the last result, before its payload of the next round.
    void hear(bool applied) {
        if (open_) {
            settle(applied);
            applied_ = applied;
        }
        BPS_CHECK_EQ(applied, applied_) << "gcompress: some workers applied the last result and some did not: all "
                                           "must step or skip a step alike";
    }

    bool any(const float* values) const {
        for (int64_t i = 0; i < plan_.entries; ++i)
            if (values[i] != 0.0f) return true;  // a NaN, too
        return false;
    }

    // Another one for every key, step that was applied, and side.
    uint32_t seed() { return (key_ * 2654435761u) ^ (step_ * 40503u) ^ (side_ << 24); }

    const Method* const method_;
    const std::string spec_;
    const Plan plan_;
    const uint32_t key_;
    const int64_t tensor_;
    const float decay_;  // what is left of a residual at the next step
    const bool feedback_;
    const int64_t bytes_;  // of a payload
    uint32_t side_ = 0, step_ = 1;
    bool open_ = false;      // whether nobody has said yet that the last result was applied
    bool proposed_ = false;  // whether sent_ is the residual if it was
    bool applied_ = true;    // what the first worker said of it
    std::vector<uint32_t> work_;
    std::vector<float> residual_, corrected_, sent_;
};

CompressorRegistry::Register registered("gcompress_compressor",
                                        [](const kwargs_t& kwargs, size_t size, DataType dtype) {
                                            return std::unique_ptr<Compressor>(new Partition(kwargs, size, dtype));
                                        });

}  // namespace
}  // namespace byteps

// Before a worker pushes a tensor: whether its last result was applied, and whether there is no gradient of it.
extern "C" __attribute__((visibility("default"))) void gcompress_byteps_tell(int64_t tensor, int applied, int absent) {
    std::lock_guard<std::mutex> lock(byteps::told_mutex);
    byteps::told[tensor] = {applied != 0, absent != 0};
}

// Take the kernels of gcompress's library and callback.py's function; returns 0, or -1 if that library has other kernels
// than the list has for which this was compiled.
extern "C" __attribute__((visibility("default"))) int gcompress_byteps_use(const gc_kernels* table,
                                                                           const gc_signature* signatures,
                                                                           byteps::Callback callback) {
    static const gc_signature expected[] = {
#define GC_KERNEL(result, name, parameters) {#result, #name, #parameters},
#include "kernels.def"
#undef GC_KERNEL
    };
    for (const gc_signature& kernel : expected) {
        if (!signatures->name || std::strcmp(signatures->name, kernel.name) ||
            std::strcmp(signatures->result, kernel.result) || std::strcmp(signatures->parameters, kernel.parameters))
            return -1;
        ++signatures;
    }
    byteps::kernels = table;
    byteps::python = callback;
    return 0;
}
