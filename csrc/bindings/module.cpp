// The Python module _C: packs tensors and numbers into the argument blocks of host/params.h, and nothing else.
//
// The Python side has validated the call; what is checked here keeps a mistake there from reading foreign memory.
#include <pybind11/pybind11.h>

#include <algorithm>

#include "bindings/functions.h"
#include "bindings/kernel_library.h"
#include "bindings/packing.h"
#include "bindings/tensor_view.h"
#include "host/params.h"

namespace py = pybind11;

namespace broadhead {
namespace {

std::int64_t metadata_size(std::int64_t batch) { return 1 + 4 * ((batch + 3) / 4 * 4); }

void forward(ArgumentReader& reader) {
  const Kernel& kernel = find_kernel(reader.text());
  const py::handle like = reader.peek();
  const TensorView q = reader.tensor("q", kernel.dtype);
  const TensorView k = reader.tensor("k", kernel.kv_dtype);
  const TensorView v = reader.tensor("v", kernel.kv_dtype);
  const TensorView out = reader.tensor("out", kernel.out_dtype, q.ndim());
  for (const auto& [tensor, name] :
       {std::pair(&q, "q"), std::pair(&k, "k"), std::pair(&v, "v"), std::pair(&out, "out")}) {
    reader.require((tensor->ndim() == 3 || tensor->ndim() == 4) && last_dim_contiguous(*tensor), name,
                   "of 3 or 4 dimensions, the last contiguous", *tensor);
    reader.require(tensor->device() == q.device(), name, "on the device of q", *tensor);
  }
  const TensorView lse = reader.optional_tensor("softmax_lse", ElementType::kFloat32, q.ndim() - 1);
  if (lse.present()) {
    reader.require(last_dim_contiguous(lse), "softmax_lse", "contiguous in its last dimension", lse);
  }
  const TensorView out_partial = reader.optional_tensor("out_partial", ElementType::kFloat32);
  const TensorView lse_partial = reader.optional_tensor("lse_partial", ElementType::kFloat32);

  AttnParams params = make_params<AttnParams>();
  params.q = q.data();
  params.k = k.data();
  params.v = v.data();
  params.out = out.data();
  params.softmax_lse = lse.as<float>();
  params.out_partial = out_partial.as<float>();
  params.lse_partial = lse_partial.as<float>();
  params.q_strides = strides_of(q);
  params.k_strides = strides_of(k);
  params.v_strides = strides_of(v);
  params.out_strides = strides_of(out);
  if (lse.present()) {
    params.lse_batch_stride = lse.ndim() == 3 ? lse.stride(0) : 0;
    params.lse_head_stride = lse.stride(-2);
  }

  std::int64_t batch = q.ndim() == 4 ? q.size(0) : -1;
  params.cu_seqlens_q = read_lengths(reader, "cu_seqlens_q", &batch, 1);
  if ((params.cu_seqlens_q != nullptr) != (q.ndim() == 3)) {
    reader.fail("cu_seqlens_q", "must be given exactly when q has 3 dimensions, got q " + q.describe());
  }
  params.cu_seqlens_k = read_lengths(reader, "cu_seqlens_k", &batch, 1);
  params.seqused_q = read_lengths(reader, "seqused_q", &batch);
  params.seqused_k = read_lengths(reader, "seqused_k", &batch);
  params.leftpad_k = read_lengths(reader, "leftpad_k", &batch);
  params.kv_batch_idx = read_lengths(reader, "kv_batch_idx", &batch);
  const TensorView page_table = reader.optional_tensor("page_table", ElementType::kInt32, 2);
  if (page_table.present()) {
    reader.require(last_dim_contiguous(page_table), "page_table", "contiguous in its last dimension", page_table);
    reader.require(k.ndim() == 4 && v.ndim() == 4, "k and v", "[pages, page_size, heads, head_dim] with a page table",
                   k);
    params.page_table = page_table.as<const std::int32_t>();
    params.page_table_batch_stride = page_table.stride(0);
    params.page_size = static_cast<std::int32_t>(k.size(1));
    params.num_pages = k.size(0);
  } else {
    reader.require(k.ndim() == (params.cu_seqlens_k != nullptr ? 3 : 4), "k",
                   params.cu_seqlens_k != nullptr ? "[tokens, heads, head_dim] with cu_seqlens_k"
                                                  : "[batch, tokens, heads, head_dim] without cu_seqlens_k",
                   k);
    (params.cu_seqlens_k != nullptr ? params.total_k : params.num_kv_batches) = k.size(0);
  }
  params.prefix_lens = read_lengths(reader, "prefix_lens", &batch);
  const TensorView sinks = reader.optional_tensor("sinks", ElementType::kOther, 1);
  if (sinks.present()) {
    params.sinks_are_fp32 = sinks.type() == ElementType::kFloat32;
    reader.require(
        (params.sinks_are_fp32 || sinks.type() == kernel.out_dtype) && contiguous(sinks) && sinks.size(0) == q.size(-2),
        "sinks", "one logit for each head of q, fp32 or the dtype of out", sinks);
    params.sinks = sinks.data();
  }
  const TensorView metadata = reader.optional_tensor("scheduler_metadata", ElementType::kInt32, 1);
  if (metadata.present()) {
    reader.require(contiguous(metadata) && metadata.size(0) >= metadata_size(batch), "scheduler_metadata",
                   "contiguous, 1 + 4 * round_up(batch, 4) entries", metadata);
    params.scheduler_metadata = metadata.as<const std::int32_t>();
  }

  params.batch = static_cast<std::int32_t>(batch);
  params.num_heads_q = static_cast<std::int32_t>(q.size(-2));
  params.num_heads_kv = static_cast<std::int32_t>(k.size(-2));
  reader.require(params.num_heads_kv > 0 && params.num_heads_q % params.num_heads_kv == 0, "k",
                 "of a head count that divides that of q", k);
  params.head_dim = static_cast<std::int32_t>(q.size(-1));
  params.head_dim_v = static_cast<std::int32_t>(v.size(-1));
  const TensorView qv = reader.optional_tensor("qv", kernel.dtype, q.ndim());
  if (qv.present()) {
    bool fits = last_dim_contiguous(qv) && qv.device() == q.device() && qv.size(-1) == v.size(-1);
    for (int dim = 0; dim < q.ndim() - 1; ++dim) fits = fits && qv.size(dim) == q.size(dim);
    reader.require(fits, "qv", "of the shape of q with head_dim_v, on its device, the last dimension contiguous", qv);
    params.qv = qv.data();
    params.qv_strides = strides_of(qv);
  }
  params.q_descale = read_descale(reader, "q_descale", batch, params.num_heads_kv, &params.q_descale_strides);
  params.k_descale = read_descale(reader, "k_descale", batch, params.num_heads_kv, &params.k_descale_strides);
  params.v_descale = read_descale(reader, "v_descale", batch, params.num_heads_kv, &params.v_descale_strides);

  params.seqlen_q = reader.integer("seqlen_q");
  params.seqlen_k = reader.integer("seqlen_k");
  params.total_q = q.ndim() == 4 ? q.size(0) * q.size(1) : q.size(0);
  // Packed: no sequence is longer than all rows, whatever bound the caller gave.
  if (q.ndim() == 3 && params.total_q < params.seqlen_q) params.seqlen_q = static_cast<std::int32_t>(params.total_q);
  params.window_left = reader.integer("window_left");
  params.window_right = reader.integer("window_right");
  params.attention_chunk = reader.integer("attention_chunk");
  params.softmax_scale = reader.number();
  params.softcap = reader.number();
  params.num_splits = reader.integer("num_splits");
  params.pack_gqa = reader.integer("pack_gqa");
  params.metadata_tag = reader.integer("metadata_tag");
  params.heads_per_section = reader.integer("heads_per_section");
  params.max_blocks = reader.integer("max_blocks");
  params.cell_blocks = reader.integer("cell_blocks");
  params.q_dtype = kernel.dtype == ElementType::kFloat8E4M3 ? DataType::kFloat8E4M3
                   : kernel.dtype == ElementType::kFloat16  ? DataType::kFloat16
                                                            : DataType::kBFloat16;
  if (out_partial.present()) {
    reader.require(contiguous(out_partial), "out_partial", "contiguous", out_partial);
    params.workspace_bytes = out_partial.numel() * static_cast<std::int64_t>(sizeof(float));
  }

  std::int64_t needed = 0;  // of out_partial
  if (params.num_splits > 1 && !kernel.is_decode) {
    // One allocation may serve both: without lse_partial it follows the outputs in out_partial.
    const std::int64_t lse_count = params.num_splits * params.num_heads_q * params.total_q;
    const std::int64_t out_count = lse_count * params.head_dim_v;
    needed = out_count + (lse_partial.present() ? 0 : lse_count);
    reader.require(out_partial.present() && contiguous(out_partial) && out_partial.numel() >= needed, "out_partial",
                   "contiguous [num_splits, heads, rows, head_dim_v] when num_splits > 1, with room for lse_partial "
                   "behind it when that is None",
                   out_partial);
    if (lse_partial.present()) {
      reader.require(contiguous(lse_partial) && lse_partial.numel() >= lse_count, "lse_partial",
                     "contiguous [num_splits, heads, rows] when num_splits > 1", lse_partial);
    } else {
      params.lse_partial = params.out_partial + out_count;
    }
  }
  // A buffer that is larger than the splits need ends with the scratch of kernels that count their tiles.
  if (out_partial.present() && out_partial.numel() > needed && !kernel.is_decode) {
    params.tile_counter = reinterpret_cast<std::int32_t*>(out_partial.as<float>() + out_partial.numel() - 1);
  }

  char error[kErrorSize] = "";
  if (kernel.library->forward(kernel.index, &params, reader.stream(like, q.device()), error, kErrorSize) != 0) {
    throw BindingError(error);
  }
}

void scheduler_metadata(ArgumentReader& reader) {
  const py::handle like = reader.peek();
  const TensorView metadata = reader.tensor("metadata", ElementType::kInt32, 1);
  std::int64_t batch = reader.peek_integer(5);
  reader.require(contiguous(metadata) && batch >= 0 && metadata.size(0) >= metadata_size(batch), "metadata",
                 "contiguous, 1 + 4 * round_up(batch, 4) entries", metadata);

  SchedulerMetadataParams params = make_params<SchedulerMetadataParams>();
  params.metadata = metadata.as<std::int32_t>();
  params.seqused_k = read_lengths(reader, "seqused_k", &batch);
  params.cu_seqlens_k = read_lengths(reader, "cu_seqlens_k", &batch, 1);
  params.leftpad_k = read_lengths(reader, "leftpad_k", &batch);
  params.cu_seqlens_q = read_lengths(reader, "cu_seqlens_q", &batch, 1);
  params.seqused_q = read_lengths(reader, "seqused_q", &batch);
  params.batch = reader.integer("batch");
  params.seqlen_q = reader.integer("seqlen_q");
  params.seqlen_k = reader.integer("seqlen_k");
  params.seqlen_k_new = reader.integer("seqlen_k_new");
  params.window_left = reader.integer("window_left");
  params.window_right = reader.integer("window_right");
  params.attention_chunk = reader.integer("attention_chunk");
  params.rows_per_token = reader.integer("rows_per_token");
  params.heads_in_grid = reader.integer("heads_in_grid");
  params.tile_m = reader.integer("tile_m");
  params.tile_n = reader.integer("tile_n");
  params.num_splits = reader.integer("num_splits");
  params.target_ctas = reader.integer("target_ctas");
  params.metadata_tag = reader.integer("metadata_tag");

  char error[kErrorSize] = "";
  void* stream = reader.stream(like, metadata.device());
  if (common_library().scheduler_metadata(&params, stream, error, kErrorSize) != 0) throw BindingError(error);
}

void combine(ArgumentReader& reader) {
  const py::handle like = reader.peek();
  const TensorView out_partial = reader.tensor("out_partial", ElementType::kFloat32, 4);
  const TensorView lse_partial = reader.tensor("lse_partial", ElementType::kFloat32, 3);
  const TensorView out = reader.tensor("out", ElementType::kOther, 3);
  const TensorView lse = reader.optional_tensor("softmax_lse", ElementType::kFloat32, 2);
  reader.require(last_dim_contiguous(out_partial), "out_partial", "contiguous in its last dimension", out_partial);
  for (int dim = 0; dim < 3; ++dim) {
    reader.require(lse_partial.size(dim) == out_partial.size(dim), "lse_partial",
                   "[splits, rows, heads] as out_partial has them", lse_partial);
    reader.require(out.size(dim) == out_partial.size(dim + 1), "out",
                   "[rows, heads, head_dim_v] as out_partial has them", out);
  }
  reader.require(
      last_dim_contiguous(out) && (out.type() == ElementType::kFloat32 || out.type() == ElementType::kBFloat16 ||
                                   out.type() == ElementType::kFloat16),
      "out", "fp32, bf16 or fp16 and contiguous in its last dimension", out);
  reader.require(!lse.present() || (lse.size(0) == out.size(0) && lse.size(1) == out.size(1)), "softmax_lse",
                 "[rows, heads] as out has them", lse);

  CombineParams params = make_params<CombineParams>();
  params.out_partial = out_partial.as<const float>();
  params.lse_partial = lse_partial.as<const float>();
  params.out = out.data();
  params.softmax_lse = lse.as<float>();
  params.out_partial_split_stride = out_partial.stride(0);
  params.out_partial_row_stride = out_partial.stride(1);
  params.out_partial_head_stride = out_partial.stride(2);
  params.lse_partial_split_stride = lse_partial.stride(0);
  params.lse_partial_row_stride = lse_partial.stride(1);
  params.lse_partial_head_stride = lse_partial.stride(2);
  params.out_row_stride = out.stride(0);
  params.out_head_stride = out.stride(1);
  params.lse_row_stride = lse.present() ? lse.stride(0) : 0;
  params.lse_head_stride = lse.present() ? lse.stride(1) : 0;
  params.rows = out.size(0);
  params.heads = static_cast<std::int32_t>(out.size(1));
  params.head_dim_v = static_cast<std::int32_t>(out.size(2));
  params.num_splits = static_cast<std::int32_t>(out_partial.size(0));
  params.out_dtype = out.type() == ElementType::kFloat32 ? 0 : out.type() == ElementType::kBFloat16 ? 1 : 2;

  char error[kErrorSize] = "";
  void* stream = reader.stream(like, out.device());
  if (common_library().combine(&params, stream, error, kErrorSize) != 0) throw BindingError(error);
}

py::dict build_info() {
  py::dict families, errors;
  for (const KernelLibrary* library : all_libraries()) {
    if (!library->error.empty()) {
      errors[py::str(library->family)] = library->error;
      continue;
    }
    py::list kernels;
    for (const std::string& id : library->kernels) kernels.append(id);
    py::dict family;
    family["archs"] = library->archs;
    // CUDART_VERSION is 1000 * major + 10 * minor.
    family["cuda"] = py::make_tuple(library->cuda_version / 1000, library->cuda_version % 1000 / 10);
    family["kernels"] = kernels;
    family["path"] = library->path;
    families[py::str(library->family)] = family;
  }
  py::dict info;
  info["version"] = BROADHEAD_VERSION;
  info["families"] = families;
  info["errors"] = errors;
  return info;
}

void raise_kernel_error(const char* text) {
  static PyObject* type = nullptr;
  if (type == nullptr) {
    PyObject* module = PyImport_ImportModule("broadhead.errors");
    type = module != nullptr ? PyObject_GetAttrString(module, "KernelError") : nullptr;
    Py_XDECREF(module);
    if (type == nullptr) return;  // the failed import is the exception
  }
  PyErr_SetString(type, text);
}

// The METH_FASTCALL function of `body`: C++ exceptions end here.
template <const char* name, void (*body)(ArgumentReader&), Py_ssize_t expected>
PyObject* fastcall(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  try {
    ArgumentReader reader(name, arguments, count, expected);
    body(reader);
    Py_RETURN_NONE;
  } catch (py::error_already_set& exception) {
    exception.restore();
  } catch (const BindingError& exception) {
    raise_kernel_error(exception.what());
  } catch (const py::builtin_exception& exception) {
    exception.set_error();
  } catch (const std::exception& exception) {
    raise_kernel_error(exception.what());
  }
  return nullptr;
}

// bytes that tell apart calls that validation could tell apart by their tensors: q, k, v, out and qv also by alignment.
// None when a tensor can not be read that way.
PyObject* signature(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  constexpr Py_ssize_t kAlignedTensors = 5;
  static std::string* text = new std::string();  // the GIL guards it; it keeps its capacity
  text->clear();
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!append_signature(arguments[i], i < kAlignedTensors, *text)) Py_RETURN_NONE;
  }
  return PyBytes_FromStringAndSize(text->data(), static_cast<Py_ssize_t>(text->size()));
}

constexpr char kForward[] = "forward";
constexpr char kSchedulerMetadata[] = "scheduler_metadata";
constexpr char kCombine[] = "combine";
constexpr char kAppendKv[] = "append_kv";
constexpr char kMergeStates[] = "merge_states";

template <const char* name, void (*body)(ArgumentReader&), Py_ssize_t expected>
PyMethodDef method(const char* doc) {
  auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&fastcall<name, body, expected>));
  return {name, function, METH_FASTCALL, doc};
}

// The module keeps pointers to these. Signatures: python/broadhead/_C.pyi.
PyMethodDef methods[] = {
    method<kForward, &forward, 36>("Launches one forward kernel by its row id."),
    method<kSchedulerMetadata, &scheduler_metadata, 21>("Fills scheduler metadata on the device."),
    method<kCombine, &combine, 5>("Merges partial results into one."),
    method<kAppendKv, &append_kv, 20>("Appends new keys and values to a cache, with rotary embedding."),
    method<kMergeStates, &merge_states, 7>("Merges two attention results."),
    {"signature", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&signature)), METH_FASTCALL,
     "What validation reads of tensors, as bytes."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace
}  // namespace broadhead

PYBIND11_MODULE(_C, module) {
  module.doc() = "Packs tensors into argument blocks and launches the kernels of libbroadhead_<family>.so.";
  module.def("build_info", &broadhead::build_info,
             "What is installed: {'version', 'families': {name: {'archs', 'cuda', 'kernels', 'path'}}, 'errors': "
             "{name: why}}.");
  if (PyModule_AddFunctions(module.ptr(), broadhead::methods) != 0) throw py::error_already_set();
}
