#include <nanobind/ndarray.h>

#include <cstring>
#include <unordered_map>

#include "common.hpp"

namespace expertwire::python {

namespace {

struct DTypeName {
  const char* name;
  DType dtype;
};
constexpr DTypeName kNames[] = {
    {"bfloat16", DType::bf16},     {"float16", DType::fp16},
    {"float32", DType::fp32},      {"bf16", DType::bf16},
    {"fp16", DType::fp16},         {"fp32", DType::fp32},
    {"fp8_e4m3", DType::fp8_e4m3}, {"float8_e4m3fn", DType::fp8_e4m3},
    {"int32", DType::int32},       {"int64", DType::int64},
    {"uint8", DType::uint8},
};

nb::object attribute(nb::handle object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object.ptr(), name);
  if (value == nullptr) throw nb::python_error();
  return nb::steal(value);
}

/// Attribute names are made once: a call reads some forty of them.
struct Names {
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* get_device = PyUnicode_InternFromString("get_device");
};
const Names& names() {
  static const Names all;
  return all;
}

using Sizes = std::array<std::int64_t, TensorView::kMaxDimensions>;

int take_sizes(const char* name, nb::handle sequence, Sizes& sizes) {
  int count = 0;
  for (nb::handle size : sequence) {
    if (count == TensorView::kMaxDimensions)
      throw Error(ErrorCode::invalid_argument, std::string(name) + " has more than 4 dimensions");
    sizes[static_cast<std::size_t>(count++)] = nb::cast<std::int64_t>(size);
  }
  return count;
}

struct Parts {
  void* data = nullptr;
  DType dtype = DType::uint8;
  int dimensions = 0;
  Sizes shape{}, strides{};  // in elements
  int device = kHost;
};

TensorView make_view(const Parts& p) {
  const auto& s = p.shape;
  const auto& t = p.strides;
  TensorView view;
  switch (p.dimensions) {
    case 1:
      view = TensorView(p.data, p.dtype, {s[0]}).strided({t[0]});
      break;
    case 2:
      view = TensorView(p.data, p.dtype, {s[0], s[1]}).strided({t[0], t[1]});
      break;
    case 3:
      view = TensorView(p.data, p.dtype, {s[0], s[1], s[2]}).strided({t[0], t[1], t[2]});
      break;
    case 4:
      view =
          TensorView(p.data, p.dtype, {s[0], s[1], s[2], s[3]}).strided({t[0], t[1], t[2], t[3]});
      break;
    default:
      throw Error(ErrorCode::invalid_argument, "an array has no dimensions; it must have 1 to 4");
  }
  return view.on(p.device);
}

TensorView view_of_torch(const char* name, nb::handle tensor) {
  const Names& n = names();
  Parts p;
  p.data = reinterpret_cast<void*>(nb::cast<std::uintptr_t>(attribute(tensor, n.data_ptr)()));
  p.dtype = dtype_of(name, attribute(tensor, n.dtype));
  p.dimensions = take_sizes(name, attribute(tensor, n.shape), p.shape);
  take_sizes(name, attribute(tensor, n.stride)(), p.strides);
  const int device = nb::cast<int>(attribute(tensor, n.get_device)());
  p.device = device < 0 ? kHost : device;
  return make_view(p);
}

/// `__array_interface__` of NumPy and `__cuda_array_interface__` of CuPy and others.
TensorView view_of_interface(const char* name, nb::handle array, const nb::object& interface,
                             int device) {
  Parts p;
  p.device = device;
  p.dtype = dtype_of(name, array.attr("dtype"));
  p.data = reinterpret_cast<void*>(nb::cast<std::uintptr_t>(interface["data"][0]));
  p.dimensions = take_sizes(name, interface["shape"], p.shape);
  const nb::object strides = nb::steal(PyObject_CallMethod(interface.ptr(), "get", "s", "strides"));
  if (strides.is_valid() && !strides.is_none()) {
    take_sizes(name, strides, p.strides);
    for (std::int64_t& stride : p.strides) stride /= static_cast<std::int64_t>(size_of(p.dtype));
  } else {
    std::int64_t next = 1;
    for (int i = p.dimensions - 1; i >= 0; --i) {
      p.strides[static_cast<std::size_t>(i)] = next;
      next *= p.shape[static_cast<std::size_t>(i)];
    }
  }
  return make_view(p);
}

}  // namespace

std::string class_name(nb::handle object) {
  return nb::cast<std::string>(
      nb::borrow(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()))).attr("__name__"));
}

DType dtype_of(const char* name, nb::handle dtype) {
  // A dtype of torch and of NumPy is one object; a reference is kept so that it stays that one.
  static std::unordered_map<PyObject*, DType> known;
  if (const auto found = known.find(dtype.ptr()); found != known.end()) return found->second;
  std::string text = nb::cast<std::string>(nb::str(dtype));
  if (text.rfind("torch.", 0) == 0) text = text.substr(6);
  for (const DTypeName& entry : kNames) {
    if (text != entry.name) continue;
    if (!nb::isinstance<nb::str>(dtype) && known.size() < 64)
      known.emplace(nb::borrow(dtype).release().ptr(), entry.dtype);
    return entry.dtype;
  }
  throw Error(ErrorCode::invalid_argument,
              std::string(name) + " has dtype " + text +
                  "; it must be bfloat16, float16, float32, float8_e4m3fn, int32, int64 or uint8");
}

TensorView view_of(const char* name, nb::handle array, Use use) {
  if (array.is_none()) return {};
  if (PyObject_HasAttr(array.ptr(), names().data_ptr)) return view_of_torch(name, array);
  if (nb::hasattr(array, "__cuda_array_interface__"))
    return view_of_interface(name, array, array.attr("__cuda_array_interface__"),
                             nb::hasattr(array, "device")
                                 ? nb::cast<int>(array.attr("device").attr("id"))
                                 : kUnknownDevice);
  if (nb::hasattr(array, "__array_interface__")) {
    const nb::object interface = array.attr("__array_interface__");
    if (use == Use::write && nb::cast<bool>(interface["data"][1]))
      throw Error(ErrorCode::invalid_argument,
                  std::string(name) + " is read-only; it must be an array that can be written");
    return view_of_interface(name, array, interface, kHost);
  }
  throw Error(ErrorCode::invalid_argument, std::string(name) + " is a " + class_name(array) +
                                               "; it must be an array of torch, NumPy or CuPy");
}

std::shared_ptr<void> keep(nb::object object) {
  PyObject* raw = object.release().ptr();
  return {raw, [](void* p) {
            nb::gil_scoped_acquire gil;
            Py_DECREF(static_cast<PyObject*>(p));
          }};
}

nb::object export_view(const TensorView& view, std::shared_ptr<void> owner) {
  if (!view.present()) return nb::none();
  constexpr std::uint8_t kInt = 0, kUint = 1, kFloat = 2, kBfloat = 4, kFloat8E4m3fn = 10;
  const auto code = [&] {
    switch (view.dtype()) {
      case DType::bf16:
        return kBfloat;
      case DType::fp16:
      case DType::fp32:
        return kFloat;
      case DType::fp8_e4m3:
        return kFloat8E4m3fn;
      case DType::int32:
      case DType::int64:
        return kInt;
      case DType::uint8:
        return kUint;
    }
    return kUint;
  }();
  std::size_t shape[TensorView::kMaxDimensions];
  for (int i = 0; i < view.dimensions(); ++i) shape[i] = static_cast<std::size_t>(view.size(i));
  nb::capsule holder(new std::shared_ptr<void>(std::move(owner)), [](void* p) noexcept {
    nb::gil_scoped_release release;
    delete static_cast<std::shared_ptr<void>*>(p);
  });
  const bool host = view.device() < 0;
  const nb::dlpack::dtype dtype{code, static_cast<std::uint8_t>(size_of(view.dtype()) * 8), 1};
  return nb::cast(nb::ndarray<nb::array_api>(
      view.data(), static_cast<std::size_t>(view.dimensions()), shape, holder, nullptr, dtype,
      host ? nb::device::cpu::value : nb::device::cuda::value, host ? 0 : view.device()));
}

PythonAllocator::PythonAllocator(nb::object allocator, nb::handle like)
    : allocator_(std::move(allocator)), like_(like) {}

Allocation PythonAllocator::operator()(const AllocationRequest& request) {
  nb::gil_scoped_acquire gil;
  if (allocator_.is_none())
    allocator_ = nb::module_::import_("expertwire._arrays").attr("allocator_like")(like_);
  nb::list shape;
  for (int i = 0; i < request.like.dimensions(); ++i) shape.append(request.like.size(i));
  const std::string name(request.name);
  const std::string_view dtype = to_string(request.like.dtype());
  nb::object array =
      allocator_(nb::str(name.c_str()), nb::str(dtype.data(), dtype.size()), nb::tuple(shape));
  const TensorView view = view_of(name.c_str(), array, Use::write);
  if (view.dtype() != request.like.dtype() || view.elements() != request.like.elements() ||
      !view.contiguous())
    throw Error(ErrorCode::invalid_argument, "the allocator gave " + describe(view) + " for " +
                                                 name + "; it must be contiguous " +
                                                 describe(request.like));
  made_[name] = array;
  return {view.data(), keep(std::move(array))};
}

nb::object PythonAllocator::made(const char* name) const {
  const auto found = made_.find(name);
  return found == made_.end() ? nb::none() : found->second;
}

GivenOutputs::GivenOutputs(nb::handle outputs) : outputs_(nb::borrow(outputs)) {
  if (present() && !PyDict_Check(outputs_.ptr()))
    throw Error(ErrorCode::invalid_argument,
                "out is a " + class_name(outputs_) + "; it must be a dict of arrays by name");
}

nb::object GivenOutputs::array(const char* name) const {
  if (!present()) return nb::none();
  return nb::steal(PyObject_CallMethod(outputs_.ptr(), "get", "s", name));
}

TensorView GivenOutputs::view(const char* name) const {
  const std::string path = std::string("out['") + name + "']";
  return view_of(path.c_str(), array(name), Use::write);
}

void GivenOutputs::check_names(std::initializer_list<const char*> names) const {
  if (!present()) return;
  for (nb::handle key : outputs_) {
    const std::string given = nb::cast<std::string>(nb::str(key));
    std::string all;
    bool known = false;
    for (const char* name : names) {
      known = known || given == name;
      all += std::string(all.empty() ? "" : ", ") + name;
    }
    if (!known)
      throw Error(ErrorCode::invalid_argument, "out has '" + given + "'; its names are " + all);
  }
}

}  // namespace expertwire::python
