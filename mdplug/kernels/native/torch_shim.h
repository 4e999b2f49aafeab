// What this library uses of torch's stable C interface (torch >= 2.10, torch/csrc/stable/c/shim.h), declared here so that
// no torch is needed to build it. The symbols are found in the libtorch that the process has loaded.
#pragma once
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

extern "C" {
struct AtenTensorOpaque;
typedef AtenTensorOpaque* AtenTensorHandle;
class TorchLibraryOpaque;
typedef TorchLibraryOpaque* TorchLibraryHandle;
typedef uint64_t StableIValue;
typedef int32_t AOTITorchError;

AOTITorchError aoti_torch_library_init_fragment(const char*, const char*, uint32_t, TorchLibraryHandle*);
AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, TorchLibraryHandle*);
AOTITorchError aoti_torch_library_def(TorchLibraryHandle, const char*);
AOTITorchError aoti_torch_library_impl(TorchLibraryHandle, const char*, void (*)(StableIValue*, uint64_t, uint64_t));
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle);
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle, void**);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle, int64_t*);
AOTITorchError aoti_torch_get_numel(AtenTensorHandle, int64_t*);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle, int64_t**);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle, int32_t*);
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle, bool*);
AOTITorchError aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                                        AtenTensorHandle*);
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_dtype_int64();
AOTITorchError torch_parallel_for(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
}

namespace mdplug {

inline void check(AOTITorchError code, const char* what) {
  if (code != 0) throw std::runtime_error(std::string("mdplug kernels: torch refused ") + what);
}

template <class T>
int32_t dtype_code();
template <>
inline int32_t dtype_code<float>() { return aoti_torch_dtype_float32(); }
template <>
inline int32_t dtype_code<double>() { return aoti_torch_dtype_float64(); }
template <>
inline int32_t dtype_code<int32_t>() { return aoti_torch_dtype_int32(); }
template <>
inline int32_t dtype_code<int64_t>() { return aoti_torch_dtype_int64(); }

// An argument: owned here, as torch hands it over.
class Tensor {
 public:
  explicit Tensor(StableIValue value) { std::memcpy(&handle_, &value, sizeof handle_); }
  Tensor(const Tensor&) = delete;
  Tensor(Tensor&& other) noexcept : handle_(other.handle_) { other.handle_ = nullptr; }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  template <class T>
  static Tensor empty(std::initializer_list<int64_t> sizes) {
    std::vector<int64_t> size(sizes), stride(sizes.size(), 1);
    for (int64_t d = int64_t(size.size()) - 2; d >= 0; --d) stride[d] = stride[d + 1] * (size[d + 1] ? size[d + 1] : 1);
    AtenTensorHandle handle;
    check(aoti_torch_empty_strided(int64_t(size.size()), size.data(), stride.data(), dtype_code<T>(),
                                   aoti_torch_device_type_cpu(), 0, &handle),
          "memory");
    return Tensor(handle);
  }
  int64_t numel() const {
    int64_t n;
    check(aoti_torch_get_numel(handle_, &n), "numel");
    return n;
  }
  int64_t size(int d) const {
    int64_t n, *sizes;
    check(aoti_torch_get_dim(handle_, &n), "dim");
    check(aoti_torch_get_sizes(handle_, &sizes), "sizes");
    if (d < 0) d += int(n);
    if (d < 0 || d >= n) throw std::runtime_error("mdplug kernels: an argument has too few dimensions");
    return sizes[d];
  }
  bool is_float32() const {
    int32_t code;
    check(aoti_torch_get_dtype(handle_, &code), "dtype");
    return code == aoti_torch_dtype_float32();
  }
  // The data, which must be contiguous and of this type; null where there is none.
  template <class T>
  T* data(const char* name) const {
    int32_t code;
    bool contiguous = true;
    check(aoti_torch_get_dtype(handle_, &code), "dtype");
    check(aoti_torch_is_contiguous(handle_, &contiguous), "strides");
    if (code != dtype_code<T>() || !contiguous)
      throw std::runtime_error(std::string("mdplug kernels: ") + name + " has another dtype or is not contiguous");
    void* p;
    check(aoti_torch_get_data_ptr(handle_, &p), "data");
    return numel() ? static_cast<T*>(p) : nullptr;
  }
  StableIValue release() {
    StableIValue value = 0;
    std::memcpy(&value, &handle_, sizeof handle_);
    handle_ = nullptr;
    return value;
  }

 private:
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  AtenTensorHandle handle_;
};

inline double to_double(StableIValue value) {
  double x;
  std::memcpy(&x, &value, sizeof x);
  return x;
}
inline int64_t to_int(StableIValue value) { return int64_t(value); }

inline void parallel(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  if (n == 1) return body(0, 1, context);
  check(torch_parallel_for(0, n, 1, body, context), "threads");
}

// Arguments from the stack, in order; every tensor is owned until the end of the call.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : stack_(stack) {}
  Tensor& tensor() {
    tensors_.reserve(32);
    tensors_.emplace_back(stack_[next_++]);
    return tensors_.back();
  }
  double real() { return to_double(stack_[next_++]); }
  int64_t integer() { return to_int(stack_[next_++]); }

 private:
  StableIValue* stack_;
  int next_ = 0;
  std::vector<Tensor> tensors_;
};

struct Operator {
  const char *name, *arguments, *results;
  void (*function)(StableIValue*, uint64_t, uint64_t);
};

template <int N>
void register_operators(const Operator (&operators)[N]) {
  TorchLibraryHandle define, implement;
  check(aoti_torch_library_init_fragment("mdplug", __FILE__, __LINE__, &define), "the namespace");
  check(aoti_torch_library_init_impl("mdplug", "CPU", __FILE__, __LINE__, &implement), "the CPU key");
  for (const Operator& o : operators) {
    const std::string schema = std::string(o.name) + "(" + o.arguments + ") -> " + o.results;
    check(aoti_torch_library_def(define, schema.c_str()), o.name);
    check(aoti_torch_library_impl(implement, o.name, o.function), o.name);
  }
}

}  // namespace mdplug
