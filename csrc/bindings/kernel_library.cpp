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
  decltype(&broadhead_kernel_id) kernel_id;
  if (!resolve(handle, "broadhead_abi_version", abi_version, library)) return;
  if (abi_version() != kAbiVersion) {
    library.error = library.path + " has ABI version " + std::to_string(abi_version()) + ", this module needs " +
                    std::to_string(kAbiVersion) + ": install module and libraries from one build";
    return;
  }
  if (!resolve(handle, "broadhead_build_archs", build_archs, library) ||
      !resolve(handle, "broadhead_cuda_version", cuda_version, library) ||
      !resolve(handle, "broadhead_kernel_count", kernel_count, library) ||
      !resolve(handle, "broadhead_kernel_id", kernel_id, library) ||
      !resolve(handle, "broadhead_forward", library.forward, library) ||
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
  for (int index = 0; index < kernel_count(); ++index) library.kernels.emplace_back(kernel_id(index));
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

ElementType dtype_of(const std::string& id) {
  auto ends_with = [&](const std::string& end) {
    return id.size() >= end.size() && id.compare(id.size() - end.size(), end.size(), end) == 0;
  };
  if (ends_with("_bf16")) return ElementType::kBFloat16;
  if (ends_with("_fp16")) return ElementType::kFloat16;
  if (ends_with("_e4m3")) return ElementType::kFloat8E4M3;
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

const Kernel& find_kernel(const char* id) {
  static auto* kernels = new std::unordered_map<std::string, Kernel>();
  std::string name = id;
  auto found = kernels->find(name);
  if (found != kernels->end()) return found->second;

  const std::string family = name.substr(0, name.find('_'));
  const KernelLibrary* library = load(family);
  if (library == nullptr) throw BindingError(name + ": " + no_library(family));
  if (!library->error.empty()) throw BindingError(name + ": " + library->error);
  for (std::size_t index = 0; index < library->kernels.size(); ++index) {
    if (library->kernels[index] == name) {
      // "..._bf16_kve4m3": q is bf16, k and v are e4m3.
      constexpr char kKv[] = "_kv";
      const std::size_t kv = name.rfind(kKv);
      const ElementType dtype = dtype_of(name.substr(0, kv));
      const ElementType kv_dtype = kv == std::string::npos ? dtype : dtype_of("_" + name.substr(kv + sizeof(kKv) - 1));
      const bool is_decode = name.find("_decode_") != std::string::npos;
      const Kernel kernel{library, static_cast<int>(index), dtype, kv_dtype, out_dtype_of(dtype), is_decode};
      return kernels->emplace(name, kernel).first->second;
    }
  }
  throw BindingError(name + ": " + library->path + " was built without this kernel (it holds " +
                     std::to_string(library->kernels.size()) + ", for \"" + library->archs + "\")");
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
