// The Python module _C: packs tensors and numbers into the argument blocks of host/params.h, and nothing else.
//
// The Python side has validated the call; what is checked here keeps a mistake there from reading foreign memory.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>

#include "bindings/attention_call.h"
#include "bindings/backward.h"
#include "bindings/call_table.h"
#include "bindings/functions.h"
#include "bindings/kernel_library.h"
#include "bindings/packing.h"
#include "bindings/tensor_view.h"
#include "host/params.h"

namespace py = pybind11;

namespace broadhead {
namespace {

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

  void* stream = reader.stream(like, out.device());
  const KernelLibrary& library = common_library();
  run_without_gil(false, [&](char* error) { return library.combine(&params, stream, error, kErrorSize); });
}

py::dict build_info() {
  py::dict families, errors;
  for (const KernelLibrary* library : all_libraries()) {
    if (!library->error.empty()) {
      errors[py::str(library->family)] = library->error;
      continue;
    }
    py::list kernels;
    for (const KernelInfo* info : library->kernels) kernels.append(info->id);
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

// What a METH_FASTCALL function returns: C++ exceptions end here.
template <class Body>
PyObject* guarded(const Body& body) {
  try {
    return body().release().ptr();
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

template <const char* name, auto body, Py_ssize_t expected>
PyObject* fastcall(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&]() -> py::object {
    ArgumentReader reader(name, arguments, count, expected);
    if constexpr (std::is_void_v<decltype(body(reader))>) {
      body(reader);
      return py::none();
    } else {
      return body(reader);
    }
  });
}

constexpr char kRunKnown[] = "run_known";
constexpr char kRunNew[] = "run_new";
constexpr char kRunKnownShared[] = "run_known_shared";
constexpr char kRunNewShared[] = "run_new_shared";
constexpr char kRunBackward[] = "run_backward";
constexpr char kCombine[] = "combine";
constexpr char kAppendKv[] = "append_kv";
constexpr char kRunKnownAppend[] = "run_known_append";
constexpr char kRememberAppend[] = "remember_append";
constexpr char kRunKnownMerge[] = "run_known_merge";
constexpr char kRunNewMerge[] = "run_new_merge";
constexpr char kRunKnownMetadata[] = "run_known_metadata";
constexpr char kRunNewMetadata[] = "run_new_metadata";

template <const char* name, auto body, Py_ssize_t expected>
PyMethodDef method(const char* doc) {
  auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&fastcall<name, body, expected>));
  return {name, function, METH_FASTCALL, doc};
}

// The module keeps pointers to these. Signatures: python/broadhead/_C.pyi.
PyMethodDef methods[] = {
    method<kRunKnown, &run_known, 3>("Runs a call that is like one before; None: there was none."),
    method<kRunNew, &run_new, 4>("Runs a call by its Launch, which all calls like it then run by."),
    method<kRunKnownShared, &run_known_shared, 5>("As run_known, over keys that all sequences share."),
    method<kRunNewShared, &run_new_shared, 6>("As run_new, over keys that all sequences share."),
    method<kRunBackward, &run_backward, 9>("Runs a backward call by its BackwardLaunch."),
    method<kCombine, &combine, 5>("Merges partial results into one."),
    method<kAppendKv, &append_kv, 20>("Appends new keys and values to a cache, with rotary embedding."),
    method<kRunKnownAppend, &run_known_append, 4>("As run_known, of a call that appends new keys first."),
    method<kRememberAppend, &remember_append, 5>(
        "Makes calls known that append first, by the Launch of their attention."),
    method<kRunKnownMerge, &run_known_merge, 5>("Merges two attention results as one like them before; None: none."),
    method<kRunNewMerge, &run_new_merge, 8>("Merges two attention results, as all like them then are."),
    method<kRunKnownMetadata, &run_known_metadata, 6>(
        "Plans splits by a request like one before; None: there was none."),
    method<kRunNewMetadata, &run_new_metadata, 10>("Plans splits, as all requests like it then are."),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace
}  // namespace broadhead

PYBIND11_MODULE(_C, module) {
  module.doc() = "Packs tensors into argument blocks and launches the kernels of libbroadhead_<family>.so.";
  module.def("build_info", &broadhead::build_info,
             "What is installed: {'version', 'families': {name: {'archs', 'cuda', 'kernels', 'path'}}, 'errors': "
             "{name: why}}.");
  pybind11::class_<broadhead::Launch, std::shared_ptr<broadhead::Launch>>(module, "Launch",
                                                                          "What all calls of a kind have in common.")
      .def(pybind11::init<py::handle, py::handle, int, const py::tuple&, const py::tuple&, const py::tuple&,
                          const py::object&>(),
           py::kw_only(), py::arg("call"), py::arg("plan"), py::arg("device"), py::arg("out"), py::arg("lse"),
           py::arg("identity"), py::arg("dispatch"));
  pybind11::class_<broadhead::BackwardLaunch>(module, "BackwardLaunch", "Of all backward calls of a kind.")
      .def(pybind11::init<py::handle, py::handle, int, bool>(), py::kw_only(), py::arg("call"), py::arg("plan"),
           py::arg("device"), py::arg("deterministic"));
  module.def(
      "connect",
      [](py::dict records, py::object check_identity, py::object exchange_device, py::object restore_device,
         py::object is_grad_enabled, py::object state, py::object is_plain_type, py::object is_negative,
         py::object count_modes, py::dict forward_ad, py::object increment_version, py::object empty_like,
         py::object dtype, py::object remember_metadata) {
        using broadhead::Question;
        broadhead::connect({records, check_identity, exchange_device, restore_device, Question(is_grad_enabled), state,
                            is_plain_type, Question(is_negative), Question(count_modes), forward_ad,
                            Question(increment_version), empty_like, dtype, remember_metadata});
      },
      py::kw_only(), py::arg("records"), py::arg("check_identity"), py::arg("exchange_device"),
      py::arg("restore_device"), py::arg("is_grad_enabled"), py::arg("state"), py::arg("is_plain_type"),
      py::arg("is_negative"), py::arg("count_modes"), py::arg("forward_ad"), py::arg("increment_version"),
      py::arg("empty_like"), py::arg("dtype"), py::arg("remember_metadata"), "What running a call needs of Python.");
  module.def("forget_calls", &broadhead::forget_calls, "Forgets every call that is known.");
  module.def("known_calls_size", &broadhead::known_calls_size,
             "How many calls are known, and the bytes that they take.");
  module.def("bound_known_calls", &broadhead::bound_known_calls, py::arg("bytes"),
             "Bounds what known calls take; 0: as the module is built.");
  py::register_local_exception_translator([](std::exception_ptr exception) {
    try {
      if (exception) std::rethrow_exception(exception);
    } catch (const broadhead::BindingError& error) {
      broadhead::raise_kernel_error(error.what());
    }
  });
  if (PyModule_AddFunctions(module.ptr(), broadhead::methods) != 0) throw py::error_already_set();
}
