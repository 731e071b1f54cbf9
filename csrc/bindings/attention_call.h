// A forward call as Python hands it over, and the Launch by which all calls of its kind run.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "bindings/call_key.h"
#include "bindings/call_table.h"
#include "bindings/kernel_library.h"
#include "bindings/resources.h"
#include "bindings/tensor_view.h"
#include "host/params.h"

namespace broadhead {

// The arguments of a call, in the order of AttentionArgs (python/broadhead/call/arguments.py).
enum Argument {
#define BROADHEAD_ARGUMENT(constant, name, is_tensor, is_aligned) constant,
#include "bindings/arguments.inc"
#undef BROADHEAD_ARGUMENT
  kArgumentCount
};

struct ArgumentKind {
  const char* name;
  bool is_tensor;
  bool is_aligned;  // kernels choose by the alignment of its address
};

inline constexpr ArgumentKind kArguments[] = {
#define BROADHEAD_ARGUMENT(constant, name, is_tensor, is_aligned) {name, is_tensor, is_aligned},
#include "bindings/arguments.inc"
#undef BROADHEAD_ARGUMENT
};

constexpr bool is_tensor(int argument) { return kArguments[argument].is_tensor; }
constexpr bool is_aligned(int argument) { return kArguments[argument].is_aligned; }
constexpr const char* name_of(int argument) { return kArguments[argument].name; }

// One call: its arguments, those that are tensors as they were read, and the key that tells it from other calls.
struct AttentionCall {
  // Takes a tuple with an item for each Argument. `kind`: what the key is of.
  explicit AttentionCall(pybind11::handle tuple, CallKind kind = CallKind::kAttention);

  // Also a call over keys that all sequences share: `length` tokens of the pages of `page_table`.
  AttentionCall(pybind11::handle tuple, pybind11::handle page_table, pybind11::handle length);

  // Reads the tensors and makes the key, in one pass; false where there is no key for the call, and with Read::kKnown
  // where it can not be known. Throws when an argument is neither a tensor nor None, or q is None.
  bool read(Read what);

  // Whether a kernel may read the tensors, of plain types, as they are. False where a lazily negated view waits to be
  // resolved, and while a dispatch mode or forward-mode AD is active.
  bool is_plain() const;

  // Whether autograd is on and asks for a gradient, which no kernel has, or watches `out`.
  bool wants_gradient() const;

  bool may_run_unseen() const { return is_plain() && !wants_gradient(); }

  bool is_shared() const { return shared_length != nullptr; }

  PyObject* const* arguments;
  CallKind kind;
  CallKey key;
  TensorView tensors[kArgumentCount];
  PyObject* shared_page_table_object = nullptr;
  PyObject* shared_length = nullptr;  // an int; null: there are no such keys
  TensorView shared_page_table;
};

// A torch function that makes a tensor. Without arguments of its own it is given q.
class Allocation {
 public:
  explicit Allocation(const pybind11::tuple& function_arguments_keywords);

  pybind11::object make(pybind11::handle q) const;

 private:
  pybind11::object function_;
  pybind11::object arguments_;  // a tuple, or None
  pybind11::object keywords_;   // a dict, or None
};

// What all calls of a kind have in common. The first one packs the argument block, the others only set its addresses.
struct Launch {
  // From the records that decided it: CheckedCall (python/broadhead/call/check.py) and Plan (plan/dispatch.py).
  Launch(pybind11::handle call, pybind11::handle plan, int device_index, const pybind11::tuple& new_out,
         const pybind11::tuple& new_lse, const pybind11::tuple& identity_of_metadata,
         const pybind11::object& last_dispatch);

  const Kernel& kernel;
  pybind11::int_ device;
  Allocation out;
  Allocation lse;
  pybind11::tuple identity;   // what scheduler metadata must have been made for: arguments of check_identity
  pybind11::object dispatch;  // what last_dispatch() returns
  AttnParams params;          // without addresses

  pybind11::object accepted_record;  // of the metadata that was checked last
};

// Checks the tensors of a call and fills in what follows from them but addresses, workspace_bytes among it. Only
// whether other pointers than out and softmax_lse are null may count for the workspace.
void pack_forward(const AttentionCall& call, const Kernel& kernel, AttnParams& params);

// Sets the addresses of a call's tensors.
void set_addresses(const AttentionCall& call, AttnParams& params);

// Sets those of the masks that are given as values.
void set_mask_addresses(const AttentionCall& call, MaskValues& values);

// What Python keeps for a Launch, about: two allocations, what identifies it, the texts of a dispatch.
inline constexpr std::size_t kPythonBytes = 1200;

// What a call needs of Python, handed over by python/broadhead/run/cuda_backend.py.
struct Hooks {
  pybind11::dict records;            // address of metadata -> what it was made for
  pybind11::object check_identity;   // (function, metadata, *Launch::identity) -> the record that it compared, or None
  pybind11::object exchange_device;  // makes a device the current one -> the one before
  pybind11::object restore_device;   // likewise, but makes no context on a device that has none
  Question is_grad_enabled;
  pybind11::object state;              // its `last` is what last_dispatch() returns
  pybind11::object is_plain_type;      // whether a type's tensors are plain memory; asked once a type
  Question is_negative;                // whether a tensor is a lazily negated view
  Question count_modes;                // the dispatch modes that are active, as an int
  pybind11::dict forward_ad;           // its `_current_level` is -1 outside forward-mode AD
  Question increment_version;          // tells autograd that the tensors of a tuple were written
  pybind11::object empty_like;         // torch.empty_like
  pybind11::object dtype;              // torch.dtype
  pybind11::object remember_metadata;  // (buffer, MetadataLaunch::made_for): adds to `records`
};

const Hooks& hooks();

void connect(const Hooks& hooks);

// Whether dispatch modes or forward-mode AD see what torch functions do now: then no kernel may run unseen.
bool modes_are_active();

bool is_negative(pybind11::handle tensor);

// Tells autograd that `tensor`, which the caller gave, was written.
void mark_written(pybind11::handle tensor);

// Whether autograd is on and one of these, of which absent ones do not count, asks for a gradient.
bool wants_gradient(const std::pair<pybind11::handle, const TensorView*>* tensors, std::size_t count);

// Refuses metadata of `call` that was made for another one.
void check_metadata(Launch& launch, const AttentionCall& call, pybind11::handle function);

// One run of a Launch: what it writes is allocated by the constructor, then it can be launched.
class AttentionRun {
 public:
  // `q`: the tensor that call.tensors[kQ] was read from, by which others are allocated. The device is the current one.
  AttentionRun(Launch& launch, AttentionCall& call, pybind11::handle q, bool need_lse, bool is_first);

  // 0, or writes why not. Without the GIL.
  int launch(char* error) const;

  // Tells what was written; (out, softmax_lse or None).
  pybind11::object finish() const;

  void* stream() const { return stream_; }

 private:
  const Kernel& kernel_;
  bool out_was_given_;
  pybind11::object out_, lse_;
  AttnParams params_;
  std::optional<Scratch> scratch_;
  void* stream_;
};

// Runs a call that was read: allocates what the kernel writes, and launches it: (out, softmax_lse or None). `is_first`:
// the launch is not packed yet.
pybind11::object run(Launch& launch, AttentionCall& call, pybind11::handle function, bool need_lse, bool is_first);

}  // namespace broadhead
