// Finds, opens and checks the kernel libraries. The GIL guards the caches; nothing is ever unloaded.
#include "bindings/kernel_library.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <memory>
#include <unordered_map>

namespace fs = std::filesystem;

namespace broadhead {
namespace {

constexpr char kPrefix[] = "libbroadhead_";
constexpr char kSuffix[] = ".so";
constexpr char kPortableFamily[] = "sm80";

std::string module_directory() {
  Dl_info info;
  if (dladdr(reinterpret_cast<const void*>(&module_directory), &info) == 0 || info.dli_fname == nullptr) return ".";
  return fs::absolute(info.dli_fname).parent_path().string();
}

template <class Function>
bool resolve(void* handle, const char* name, Function& function, KernelLibrary& library) {
  function = reinterpret_cast<Function>(dlsym(handle, name));
  if (function == nullptr) library.error = library.path + " lacks " + name + ": it is no broadhead kernel library";
  return function != nullptr;
}

void open(KernelLibrary& library) {
  void* handle = dlopen(library.path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* why = dlerror();
    library.error = library.path + " does not load: " + (why != nullptr ? why : "unknown reason");
    return;
  }
  decltype(&broadhead_abi_version) abi_version;
  decltype(&broadhead_build_archs) build_archs;
  decltype(&broadhead_cuda_version) cuda_version;
  decltype(&broadhead_kernel_count) kernel_count;
  decltype(&broadhead_kernel_info) kernel_info;
  if (!resolve(handle, "broadhead_abi_version", abi_version, library)) return;
  if (abi_version() != kAbiVersion) {
    library.error = library.path + " has ABI version " + std::to_string(abi_version()) + ", this module needs " +
                    std::to_string(kAbiVersion) + ": install module and libraries from one build";
    return;
  }
  if (!resolve(handle, "broadhead_build_archs", build_archs, library) ||
      !resolve(handle, "broadhead_cuda_version", cuda_version, library) ||
      !resolve(handle, "broadhead_kernel_count", kernel_count, library) ||
      !resolve(handle, "broadhead_kernel_info", kernel_info, library) ||
      !resolve(handle, "broadhead_forward", library.forward, library) ||
      !resolve(handle, "broadhead_forward_workspace", library.forward_workspace, library) ||
      !resolve(handle, "broadhead_backward", library.backward, library) ||
      !resolve(handle, "broadhead_backward_workspace", library.backward_workspace, library) ||
      !resolve(handle, "broadhead_scheduler_metadata", library.scheduler_metadata, library) ||
      !resolve(handle, "broadhead_combine", library.combine, library) ||
      !resolve(handle, "broadhead_append_kv", library.append_kv, library) ||
      !resolve(handle, "broadhead_merge_states", library.merge_states, library)) {
    return;
  }
  library.archs = build_archs();
  library.cuda_version = cuda_version();
  for (int index = 0; index < kernel_count(); ++index) library.kernels.push_back(kernel_info(index));
}

// Opened once, also when that fails: the reason is kept.
const KernelLibrary* load(const std::string& family) {
  static auto* libraries = new std::map<std::string, std::unique_ptr<KernelLibrary>>();
  std::unique_ptr<KernelLibrary>& library = (*libraries)[family];
  if (library == nullptr) {
    fs::path path = fs::path(library_directory()) / (kPrefix + family + kSuffix);
    std::error_code ignored;
    if (!fs::exists(path, ignored)) {
      libraries->erase(family);
      return nullptr;
    }
    library = std::make_unique<KernelLibrary>();
    library->family = family;
    library->path = path.string();
    open(*library);
  }
  return library.get();
}

ElementType element_type(DataType type) {
  switch (type) {
    case DataType::kFloat32:
      return ElementType::kFloat32;
    case DataType::kBFloat16:
      return ElementType::kBFloat16;
    case DataType::kFloat16:
      return ElementType::kFloat16;
    case DataType::kFloat8E4M3:
      return ElementType::kFloat8E4M3;
  }
  return ElementType::kOther;
}

ElementType out_dtype_of(ElementType dtype) {
  return dtype == ElementType::kFloat8E4M3 ? ElementType::kBFloat16 : dtype;
}

std::string no_library(const std::string& family) {
  return "there is no " + (kPrefix + family + kSuffix) + " in " + library_directory() +
         ": this installation was built without CUDA kernels (build with BROADHEAD_CUDA_ARCHS or BROADHEAD_KERNEL_DIR, "
         "or "
         "point BROADHEAD_KERNEL_LIB_DIR at built libraries)";
}

}  // namespace

const std::string& library_directory() {
  static const auto* directory = [] {
    const char* wanted = std::getenv("BROADHEAD_KERNEL_LIB_DIR");
    return new std::string(wanted != nullptr && *wanted != '\0' ? wanted : module_directory());
  }();
  return *directory;
}

std::vector<const KernelLibrary*> all_libraries() {
  const std::size_t prefix = sizeof(kPrefix) - 1, suffix = sizeof(kSuffix) - 1;
  std::vector<const KernelLibrary*> found;
  std::error_code unreadable;
  for (const auto& entry : fs::directory_iterator(library_directory(), unreadable)) {
    std::string name = entry.path().filename().string();
    if (name.size() <= prefix + suffix || name.compare(0, prefix, kPrefix) != 0 ||
        name.compare(name.size() - suffix, suffix, kSuffix) != 0) {
      continue;
    }
    const KernelLibrary* library = load(name.substr(prefix, name.size() - prefix - suffix));
    if (library != nullptr) found.push_back(library);
  }
  std::sort(found.begin(), found.end(), [](auto* a, auto* b) { return a->family < b->family; });
  return found;
}

const Kernel& find_kernel(const std::string& family, const std::string& id, Direction direction) {
  static auto* kernels = new std::unordered_map<std::string, Kernel>();
  auto found = kernels->find(id);
  if (found == kernels->end()) {
    const KernelLibrary* library = load(family);
    if (library == nullptr) throw BindingError(id + ": " + no_library(family));
    if (!library->error.empty()) throw BindingError(id + ": " + library->error);
    const auto entry = std::find_if(library->kernels.begin(), library->kernels.end(),
                                    [&](const KernelInfo* info) { return info->id == id; });
    if (entry == library->kernels.end()) {
      throw BindingError(id + ": " + library->path + " was built without this kernel (it holds " +
                         std::to_string(library->kernels.size()) + ", for \"" + library->archs + "\")");
    }
    const ElementType dtype = element_type((*entry)->dtype);
    const Kernel kernel{library,
                        static_cast<int>(entry - library->kernels.begin()),
                        *entry,
                        dtype,
                        element_type((*entry)->kv_dtype),
                        out_dtype_of(dtype)};
    found = kernels->emplace(id, kernel).first;
  }
  if (found->second.info->direction != direction) {
    throw BindingError(id + ": a " + (direction == Direction::kForward ? "forward" : "backward") +
                       " call was given a kernel of the other direction");
  }
  return found->second;
}

const KernelLibrary& common_library() {
  static const KernelLibrary* chosen = nullptr;
  if (chosen != nullptr) return *chosen;
  std::string errors;
  for (const KernelLibrary* library : all_libraries()) {
    if (library->error.empty()) {
      if (chosen == nullptr || library->family == kPortableFamily) chosen = library;
      continue;
    }
    errors += (errors.empty() ? "" : "; ") + library->error;
  }
  if (chosen != nullptr) return *chosen;
  throw BindingError(errors.empty() ? no_library(kPortableFamily) : errors);
}

}  // namespace broadhead
