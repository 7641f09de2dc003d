// The only file that knows Python: turns tensors into views, repeats the checks that memory safety needs, calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "pyarith/ops.h"
#include "pyarith/views.h"

// kDLCUDA. The test build that runs the CUDA kernels' sources on the CPU sets kDLCPU.
#ifndef PYARITH_CUDA_DEVICE_TYPE
#define PYARITH_CUDA_DEVICE_TYPE 2
#endif

namespace py = pybind11;
using namespace pyarith;

namespace {

constexpr std::initializer_list<DType> cpu_reads = {DType::f32, DType::bf16};

PyTypeObject* tensor_type = nullptr;
int (*view_of)(void*, DLTensor*) = nullptr;

Norm norm_of(const std::string& kind) {
    if (kind == "rms") return Norm::rms;
    if (kind == "rms1p") return Norm::rms1p;
    if (kind == "layer") return Norm::layer;
    refuse("kind", "rms, rms1p or layer");
}

Act act_of(const std::string& act) {
    if (act == "silu") return Act::silu;
    if (act == "gelu") return Act::gelu;
    if (act == "gelu_tanh") return Act::gelu_tanh;
    if (act == "relu") return Act::relu;
    refuse("act", "silu, gelu, gelu_tanh or relu");
}

const char* const level_names[] = {"base", "avx2", "avx512"};

AddNorm add_norm_of(const Tensor& row, const Tensor& delta, const Tensor& write, const Tensor& weight,
                    const Tensor& bias, const Tensor& out, float eps, const std::string& kind, int device,
                    std::initializer_list<DType> reads) {
    if (!row.defined || row.view.ndim != 3) refuse("row", "[variant, batch, d_model]");
    if (!weight.defined || !out.defined) refuse("weight and out", "tensors, not None");
    const int64_t variants = row.size(0), batch = row.size(1), d_model = row.size(2);
    expect("row", row, device, {variants, batch, d_model}, {DType::f32});
    expect("delta", delta, device, {variants, batch, d_model}, reads);
    expect("write", write, device, {batch, d_model}, {DType::f32});
    expect("weight", weight, device, {d_model}, reads);
    expect("bias", bias, device, {d_model}, reads);
    expect("out", out, device, {variants, batch, d_model}, reads);
    return {static_cast<float*>(row.data()), delta.data(), static_cast<const float*>(write.data()),
            weight.data(), bias.data(), out.data(), variants, batch, d_model, eps, norm_of(kind),
            delta.dtype_or(DType::f32), weight.dtype(), bias.dtype_or(DType::f32), out.dtype()};
}

GatedAct gated_act_of(const Tensor& gate, const Tensor& up, const Tensor& out, const std::string& act, int device,
                      std::initializer_list<DType> reads) {
    if (!gate.defined || gate.view.ndim != 2 || !out.defined) refuse("gate and out", "[rows, d_mlp]");
    const int64_t rows = gate.size(0), d_mlp = gate.size(1);
    const DType dtype = gate.dtype();
    expect("gate", gate, device, {rows, d_mlp}, reads, Layout::strided_rows);
    expect("up", up, device, {rows, d_mlp}, {dtype}, Layout::strided_rows);
    expect("out", out, device, {rows, d_mlp}, {dtype}, Layout::strided_rows);
    return {gate.data(), up.data(), out.data(), rows, d_mlp, gate.view.strides[0],
            up.defined ? up.view.strides[0] : 0, out.view.strides[0], act_of(act), dtype};
}

AnswerLogits answer_logits_of(const Tensor& row, const Tensor& write, const Tensor& weight, const Tensor& bias,
                              const Tensor& target_rows, const Tensor& target_bias, const Tensor& out, float eps,
                              const std::string& kind, float scale, float softcap, int device,
                              std::initializer_list<DType> reads) {
    if (!row.defined || row.view.ndim != 3) refuse("row", "[variant, batch, d_model]");
    if (!target_rows.defined || target_rows.view.ndim != 3) refuse("target_rows", "[batch, k, d_model]");
    if (!weight.defined || !out.defined) refuse("weight and out", "tensors, not None");
    const int64_t variants = row.size(0), batch = row.size(1), d_model = row.size(2), k = target_rows.size(1);
    expect("row", row, device, {variants, batch, d_model}, {DType::f32});
    expect("write", write, device, {batch, d_model}, {DType::f32});
    expect("weight", weight, device, {d_model}, reads);
    expect("bias", bias, device, {d_model}, reads);
    expect("target_rows", target_rows, device, {batch, k, d_model}, reads);
    expect("target_bias", target_bias, device, {batch, k}, {DType::f32});
    expect("out", out, device, {variants, batch, k}, {DType::f32});
    return {static_cast<const float*>(row.data()), static_cast<const float*>(write.data()), weight.data(),
            bias.data(), target_rows.data(), static_cast<const float*>(target_bias.data()),
            static_cast<float*>(out.data()), variants, batch, k, d_model, eps, scale, softcap, norm_of(kind),
            weight.dtype(), bias.dtype_or(DType::f32), target_rows.dtype()};
}

// The slices of one step with the memory that their descriptions lie in. `bounds`: start and stop of each range, one
// slice's after the other's, `counts` of them each. Refuses all that the contract in Python refuses, which then finds
// the words for it: with this many tensors the checks are a good part of a call.
class AdamwSlices {
public:
    AdamwSlices(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                const std::vector<Tensor>& weights, const std::vector<int64_t>& bounds,
                const std::vector<int64_t>& counts, const std::vector<int64_t>& dims, int device)
        : device_{device, params.empty() ? 0 : params[0].view.device.device_id} {
        const size_t count = params.size();
        for (size_t size :
             {grads.size(), exp_avgs.size(), exp_avg_sqs.size(), weights.size(), counts.size(), dims.size()})
            if (size != count) refuse("params", "one of everything for each slice");
        runs_.reserve(bounds.size() / 2);  // slices point into it
        slices_.reserve(count);
        written_.reserve(4 * count);
        size_t next = 0;
        for (size_t i = 0; i < count; ++i) {
            const Tensor &param = params[i], &weight = weights[i];
            if (!param.defined || param.view.ndim < 1 || param.view.ndim > 2) refuse("params", "one or two dimensions");
            const int axes = param.view.ndim, dim = static_cast<int>(dims[i]);
            if (dim < 0 || dim >= axes) refuse("dims", "a dimension of the slice");
            if (!weight.defined || weight.view.ndim != axes) refuse("weights", "as many dimensions as the slice");
            for (const Tensor* tensor : {&param, &grads[i], &exp_avgs[i], &exp_avg_sqs[i]}) {
                if (!tensor->defined) refuse("slices", "tensors, not None");
                take("slices", *tensor, param.view.shape, axes, {DType::f32}, tensor != &grads[i]);
            }
            const int64_t limit = weight.size(dim), other = axes == 2 ? param.size(1 - dim) : 1;
            const int64_t whole[2] = {dim == 0 ? limit : other, dim == 0 ? other : limit};
            take("weights", weight, whole, axes, {DType::f32, DType::bf16, DType::f16}, true);
            // Whole rows follow each other without a gap: all of them are one.
            const int64_t unit = dim == 0 ? other : 1;
            const size_t first = runs_.size();
            int64_t taken = 0, before = 0;
            for (int64_t r = 0; r < counts[i]; ++r, next += 2) {
                if (next + 2 > bounds.size()) refuse("bounds", "two numbers for each range");
                const int64_t start = bounds[next], stop = bounds[next + 1];
                if (start < before || stop <= start || stop > limit) refuse("bounds", "sorted ranges inside the weight");
                runs_.push_back({taken * unit, start * unit});
                taken += stop - start;
                before = stop;
            }
            if (taken != param.size(dim)) refuse("bounds", "ranges that make up the slice");
            slices_.push_back({static_cast<float*>(param.data()), static_cast<const float*>(grads[i].data()),
                               static_cast<float*>(exp_avgs[i].data()), static_cast<float*>(exp_avg_sqs[i].data()),
                               weight.data(), dim == 0 ? 1 : other, taken * unit, limit * unit,
                               runs_.data() + first, static_cast<int64_t>(runs_.size() - first), weight.dtype()});
        }
        if (next != bounds.size()) refuse("bounds", "two numbers for each range");
        std::sort(written_.begin(), written_.end());
        for (size_t i = 1; i < written_.size(); ++i)
            if (written_[i].first < written_[i - 1].second)
                refuse("params, exp_avgs, exp_avg_sqs, weights", "tensors that share no memory");
    }

    MaskedAdamw step(const Tensor& grad_scale, AdamwFactors factors, std::optional<uint64_t> seed,
                     uint32_t step) const {
        const int64_t one = 1;
        const int axes = grad_scale.defined && grad_scale.view.ndim == 0 ? 0 : 1;
        expect("grad_scale", grad_scale, device_.device_type, &one, axes, {DType::f32});
        if (grad_scale.defined && grad_scale.view.device.device_id != device_.device_id) refuse("grad_scale", one_device);
        for (const AdamwSlice& slice : slices_)
            if (seed && slice.weight_dtype != DType::bf16) refuse("weights", "bfloat16 where a seed is given");
        return {slices_.data(), static_cast<int64_t>(slices_.size()), static_cast<const float*>(grad_scale.data()),
                factors, seed.has_value(), seed.value_or(0), step};
    }

private:
    void take(const char* name, const Tensor& tensor, const int64_t* shape, int axes,
              std::initializer_list<DType> dtypes, bool written) {
        expect(name, tensor, device_.device_type, shape, axes, dtypes);
        if (tensor.view.device.device_id != device_.device_id) refuse(name, one_device);
        const auto begin = reinterpret_cast<uintptr_t>(tensor.data());
        if (written && !empty(tensor.view)) written_.emplace_back(begin, begin + bytes(tensor.view));
    }

    static constexpr const char* one_device = "the device of the first slice";

    DLDevice device_;
    std::vector<AdamwRun> runs_;
    std::vector<AdamwSlice> slices_;
    std::vector<std::pair<uintptr_t, uintptr_t>> written_;  // [begin, end) in memory
};

void add_norm_cpu(Tensor row, Tensor delta, Tensor write, Tensor weight, Tensor bias, Tensor out, float eps,
                  const std::string& kind, int threads) {
    const AddNorm op = add_norm_of(row, delta, write, weight, bias, out, eps, kind, cpu_device, cpu_reads);
    py::gil_scoped_release unlocked;
    cpu::add_norm(op, threads);
}

void gated_act_cpu(Tensor gate, Tensor up, Tensor out, const std::string& act, int threads) {
    const GatedAct op = gated_act_of(gate, up, out, act, cpu_device, cpu_reads);
    py::gil_scoped_release unlocked;
    cpu::gated_act(op, threads);
}

void answer_logits_cpu(Tensor row, Tensor write, Tensor weight, Tensor bias, Tensor target_rows, Tensor target_bias,
                       Tensor out, float eps, const std::string& kind, float scale, float softcap, int threads) {
    const AnswerLogits op = answer_logits_of(row, write, weight, bias, target_rows, target_bias, out, eps, kind, scale,
                                             softcap, cpu_device, cpu_reads);
    py::gil_scoped_release unlocked;
    cpu::answer_logits(op, threads);
}

using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;

void masked_adamw_cpu(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                      const Tensors& exp_avg_sqs, const Tensors& weights, const Integers& bounds,
                      const Integers& counts, const Integers& dims, Tensor grad_scale, float shrink, float blend,
                      bool from_grad, float keep, float second, float unbias, float rate, float eps, std::optional<uint64_t> seed,
                      uint32_t step, int threads) {
    const AdamwSlices slices(params, grads, exp_avgs, exp_avg_sqs, weights, bounds, counts, dims, cpu_device);
    const MaskedAdamw op =
        slices.step(grad_scale, {shrink, blend, from_grad, keep, second, unbias, rate, eps}, seed, step);
    py::gil_scoped_release unlocked;
    cpu::masked_adamw(op, threads);
}

#ifdef PYARITH_WITH_CUDA
constexpr int cuda_device = PYARITH_CUDA_DEVICE_TYPE;
constexpr std::initializer_list<DType> cuda_reads = {DType::f32, DType::bf16, DType::f16};

AblateHeads ablate_heads_of(const Tensor& z, const Tensor& ablate, const Tensor& baseline, const Tensor& out) {
    if (!z.defined || z.view.ndim != 5) refuse("z", "[variant, batch, pos, head, d_head]");
    if (!ablate.defined || !out.defined) refuse("ablate and out", "tensors, not None");
    const int64_t variants = z.size(0), batch = z.size(1), pos = z.size(2), heads = z.size(3), d_head = z.size(4);
    const DType dtype = z.dtype();
    expect("z", z, cuda_device, {variants, batch, pos, heads, d_head}, cuda_reads, Layout::contiguous_heads);
    expect("out", out, cuda_device, {variants, batch, pos, heads, d_head}, {dtype});
    expect("ablate", ablate, cuda_device, {variants, heads}, {DType::boolean});
    int64_t baseline_batch = 0, baseline_pos = 0;
    if (baseline.defined) {
        const bool dims = baseline.view.ndim == 4;
        if (!dims || (baseline.size(0) != 1 && baseline.size(0) != batch)) refuse("baseline", "another shape");
        if (baseline.size(1) != 1 && baseline.size(1) != pos) refuse("baseline", "another shape");
        expect("baseline", baseline, cuda_device, {baseline.size(0), baseline.size(1), heads, d_head}, {dtype},
               Layout::contiguous_heads);
        if (baseline.size(0) > 1) baseline_batch = baseline.view.strides[0];
        if (baseline.size(1) > 1) baseline_pos = baseline.view.strides[1];
    }
    const int64_t* strides = z.view.strides;
    return {z.data(), static_cast<const unsigned char*>(ablate.data()), baseline.data(), out.data(), variants, batch,
            pos, heads, d_head, strides[0], strides[1], strides[2], baseline_batch, baseline_pos,
            z.view.dtype.bits / 8};
}

// CUDA functions return the text of an error.
void raise(const char* error) {
    if (error) throw std::runtime_error(error);
}

void add_norm_cuda(Tensor row, Tensor delta, Tensor write, Tensor weight, Tensor bias, Tensor out, float eps,
                   const std::string& kind, uintptr_t stream) {
    raise(cuda::add_norm(add_norm_of(row, delta, write, weight, bias, out, eps, kind, cuda_device, cuda_reads),
                         stream));
}

void gated_act_cuda(Tensor gate, Tensor up, Tensor out, const std::string& act, uintptr_t stream) {
    raise(cuda::gated_act(gated_act_of(gate, up, out, act, cuda_device, cuda_reads), stream));
}

void answer_logits_cuda(Tensor row, Tensor write, Tensor weight, Tensor bias, Tensor target_rows, Tensor target_bias,
                        Tensor out, float eps, const std::string& kind, float scale, float softcap,
                        uintptr_t stream) {
    raise(cuda::answer_logits(answer_logits_of(row, write, weight, bias, target_rows, target_bias, out, eps, kind,
                                               scale, softcap, cuda_device, cuda_reads),
                              stream));
}

void ablate_heads_cuda(Tensor z, Tensor ablate, Tensor baseline, Tensor out, uintptr_t stream) {
    raise(cuda::ablate_heads(ablate_heads_of(z, ablate, baseline, out), stream));
}

void masked_adamw_cuda(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                       const Tensors& exp_avg_sqs, const Tensors& weights, const Integers& bounds,
                       const Integers& counts, const Integers& dims, Tensor grad_scale, float shrink, float blend,
                       bool from_grad, float keep, float second, float unbias, float rate, float eps, std::optional<uint64_t> seed,
                       uint32_t step, uintptr_t stream) {
    const AdamwSlices slices(params, grads, exp_avgs, exp_avg_sqs, weights, bounds, counts, dims, cuda_device);
    const AdamwFactors factors{shrink, blend, from_grad, keep, second, unbias, rate, eps};
    raise(cuda::masked_adamw(slices.step(grad_scale, factors, seed, step), stream));
}

#if PYARITH_CUDA_DEVICE_TYPE == 2  // the test build has no CUDA runtime to ask
std::pair<int, int> cuda_versions() {
    const cuda::Versions found = cuda::versions();
    return {found.driver, found.runtime};
}
#endif
#endif

void attach(py::type tensor, const std::string& cpu_limit) {
    auto* api = static_cast<DLPackExchangeAPI*>(
        py::capsule(tensor.attr("__dlpack_c_exchange_api__")).get_pointer<DLPackExchangeAPI>());
    if (api->version.major != 1 || !api->dltensor_from_py_object_no_sync)
        throw std::runtime_error("this torch has another DLPack exchange table than version 1");
    tensor_type = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());  // kept for the life of the process
    view_of = api->dltensor_from_py_object_no_sync;
    for (int i = 0; i < 3; ++i)
        if (cpu_limit == level_names[i]) return cpu::limit(static_cast<cpu::Level>(i));
    refuse("cpu_limit", "base, avx2 or avx512");
}

py::dict build_info() {
    py::dict info;
    info["cpu_supported"] = level_names[static_cast<int>(cpu::supported())];
    info["cpu_level"] = level_names[static_cast<int>(cpu::level())];
#ifdef _OPENMP
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
#ifdef PYARITH_WITH_CUDA
    info["cuda"] = true;
    info["cuda_archs"] = PYARITH_CUDA_ARCHS;
    info["cuda_version"] = PYARITH_CUDA_VERSION;
#else
    info["cuda"] = false;
#endif
    info["compiler"] = PYARITH_COMPILER;
    return info;
}

}  // namespace

namespace pybind11::detail {

template <>
struct type_caster<Tensor> {
    PYBIND11_TYPE_CASTER(Tensor, const_name("torch.Tensor | None"));

    bool load(handle source, bool) {
        if (source.is_none()) return true;
        if (!tensor_type || !PyObject_TypeCheck(source.ptr(), tensor_type)) return false;
        if (view_of(source.ptr(), &value.view) != 0) throw error_already_set();
        value.defined = true;
        return true;
    }
};

}  // namespace pybind11::detail

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of pyarith. Results go into the last tensor argument; None leaves an operand out.";
    m.def("attach", &attach, py::arg("tensor_type"), py::kw_only(), py::arg("cpu_limit"),
          "Take torch's table for viewing tensors, and lower the instruction set to at most cpu_limit.");
    m.def("build_info", &build_info, "What was built and which instruction set runs.");
    m.def("add_norm_cpu", &add_norm_cpu, py::arg("row"), py::arg("delta"), py::arg("write"), py::arg("weight"),
          py::arg("bias"), py::arg("out"), py::kw_only(), py::arg("eps"), py::arg("kind"), py::arg("threads"));
    m.def("gated_act_cpu", &gated_act_cpu, py::arg("gate"), py::arg("up"), py::arg("out"), py::kw_only(),
          py::arg("act"), py::arg("threads"));
    m.def("answer_logits_cpu", &answer_logits_cpu, py::arg("row"), py::arg("write"), py::arg("weight"),
          py::arg("bias"), py::arg("target_rows"), py::arg("target_bias"), py::arg("out"), py::kw_only(),
          py::arg("eps"), py::arg("kind"), py::arg("scale"), py::arg("softcap"), py::arg("threads"));
    m.def("masked_adamw_cpu", &masked_adamw_cpu, py::arg("params"), py::arg("grads"), py::arg("exp_avgs"),
          py::arg("exp_avg_sqs"), py::arg("weights"), py::arg("bounds"), py::arg("counts"), py::arg("dims"),
          py::arg("grad_scale"), py::kw_only(), py::arg("shrink"), py::arg("blend"), py::arg("from_grad"), py::arg("keep"),
          py::arg("second"), py::arg("unbias"), py::arg("rate"), py::arg("eps"), py::arg("seed"), py::arg("step"),
          py::arg("threads"));
#ifdef PYARITH_WITH_CUDA
    m.def("add_norm_cuda", &add_norm_cuda, py::arg("row"), py::arg("delta"), py::arg("write"), py::arg("weight"),
          py::arg("bias"), py::arg("out"), py::kw_only(), py::arg("eps"), py::arg("kind"), py::arg("stream"));
    m.def("gated_act_cuda", &gated_act_cuda, py::arg("gate"), py::arg("up"), py::arg("out"), py::kw_only(),
          py::arg("act"), py::arg("stream"));
    m.def("answer_logits_cuda", &answer_logits_cuda, py::arg("row"), py::arg("write"), py::arg("weight"),
          py::arg("bias"), py::arg("target_rows"), py::arg("target_bias"), py::arg("out"), py::kw_only(),
          py::arg("eps"), py::arg("kind"), py::arg("scale"), py::arg("softcap"), py::arg("stream"));
    m.def("ablate_heads_cuda", &ablate_heads_cuda, py::arg("z"), py::arg("ablate"), py::arg("baseline"),
          py::arg("out"), py::kw_only(), py::arg("stream"));
    m.def("masked_adamw_cuda", &masked_adamw_cuda, py::arg("params"), py::arg("grads"), py::arg("exp_avgs"),
          py::arg("exp_avg_sqs"), py::arg("weights"), py::arg("bounds"), py::arg("counts"), py::arg("dims"),
          py::arg("grad_scale"), py::kw_only(), py::arg("shrink"), py::arg("blend"), py::arg("from_grad"), py::arg("keep"),
          py::arg("second"), py::arg("unbias"), py::arg("rate"), py::arg("eps"), py::arg("seed"), py::arg("step"),
          py::arg("stream"));
#if PYARITH_CUDA_DEVICE_TYPE == 2
    m.def("cuda_versions", &cuda_versions, "What CUDA the driver supports, and what this build has: 13000 is 13.0.");
#endif
#endif
}
