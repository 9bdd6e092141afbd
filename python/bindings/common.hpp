#pragma once

// What the files of the bindings share: views of the caller's arrays, and what every call takes.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <initializer_list>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "expertwire/expertwire.hpp"

namespace expertwire::python {

namespace nb = nanobind;

// One function a file, which adds its nouns to the module.
void bind_errors(nb::module_& module);
void bind_communicator(nb::module_& module);
void bind_objects(nb::module_& module);
void bind_high_throughput(nb::module_& module);
void bind_low_latency(nb::module_& module);

/// A dtype of torch or NumPy, or its name ("bf16", "bfloat16", "float32", ...). `name` is of what
/// has it, for errors.
DType dtype_of(const char* name, nb::handle dtype);

/// A view of an array of torch, NumPy, CuPy, or of anything that has `__cuda_array_interface__` or
/// `__array_interface__`; absent for None. Nothing is copied. `name` is for errors. Throws
/// `Error{invalid_argument}` for one that is to be written and must not be.
enum class Use { read, write };
TensorView view_of(const char* name, nb::handle array, Use use = Use::read);

/// The name of an object's class, for errors.
std::string class_name(nb::handle object);

/// A Python object that other threads may let go of.
std::shared_ptr<void> keep(nb::object object);

/// An array over memory of the library's that stays as long as `owner`.
nb::object export_view(const TensorView& view, std::shared_ptr<void> owner);

/// Gives outputs that the caller did not: `allocator(name, dtype, shape)` of his, or else arrays of
/// the library that `like` is of.
class PythonAllocator {
 public:
  PythonAllocator(nb::object allocator, nb::handle like);

  Allocation operator()(const AllocationRequest& request);
  /// What was given for an output; None if it was not asked for.
  nb::object made(const char* name) const;

 private:
  nb::object allocator_;
  nb::handle like_;  // an argument of the call
  std::map<std::string, nb::object, std::less<>> made_;
};

/// Outputs by name, as a caller gives them; or none.
class GivenOutputs {
 public:
  explicit GivenOutputs(nb::handle outputs);
  TensorView view(const char* name) const;
  nb::object array(const char* name) const;
  bool present() const { return !outputs_.is_none(); }
  /// Throws `Error{invalid_argument}` for a name that is not among these.
  void check_names(std::initializer_list<const char*> names) const;

 private:
  nb::object outputs_;
};

/// None, a CUDA stream of torch, a `cudaStream_t` as an int, or a Queue.
Stream stream_of(nb::handle stream);

/// What is queued on the CPU needs its arrays until it has run, whoever lets go of them.
void keep_until_run(const Stream& stream, const nb::kwargs& given, const nb::object& result);

/// Seconds, or none.
std::optional<std::chrono::milliseconds> timeout_of(std::optional<double> seconds);

/// The keyword arguments of a call, which the Python classes have given names, types and defaults.
class Arguments {
 public:
  explicit Arguments(const nb::kwargs& all) : all_(all) {}

  /// Raises a TypeError that says which there are, if another was given.
  void expect_only(std::initializer_list<const char*> names) const {
    for (const auto& [key, value] : all_) {
      const auto given = nb::cast<std::string>(key);
      if (std::find(names.begin(), names.end(), given) != names.end()) continue;
      std::string known;
      for (const char* name : names) known += (known.empty() ? "" : ", ") + std::string(name);
      throw nb::type_error(("there is no argument '" + given + "'; there are " + known).c_str());
    }
  }
  /// None if it was not given.
  nb::object object(const char* name) const {
    PyObject* value = PyDict_GetItemString(all_.ptr(), name);
    return value != nullptr ? nb::borrow(value) : nb::none();
  }
  TensorView view(const char* name, Use use = Use::read) const {
    return view_of(name, object(name), use);
  }
  template <class T>
  std::optional<T> maybe(const char* name) const {
    const nb::object given = object(name);
    if (given.is_none()) return std::nullopt;
    T value{};
    if (!nb::try_cast<T>(given, value))
      throw Error(ErrorCode::invalid_argument,
                  std::string(name) + " is " + nb::cast<std::string>(nb::repr(given)) +
                      "; it must be " +
                      (std::is_floating_point_v<T>      ? "a number"
                       : std::is_same_v<T, bool>        ? "True or False"
                       : std::is_same_v<T, std::string> ? "a string"
                                                        : "an integer that fits"));
    return value;
  }
  template <class T>
  T value(const char* name, T otherwise) const {
    return maybe<T>(name).value_or(otherwise);
  }
  /// What all requests have: a stream, a timeout, a number of SMs.
  template <class Request>
  void fill(Request& request) const {
    request.stream = stream_of(object("stream"));
    request.timeout = timeout_of(maybe<double>("timeout"));
    request.sms = value("sms", 0);
  }
  MoeShape shape() const {
    return {value("hidden", 0), value("experts", 0), value("top_k", 0), value("max_tokens", 0),
            dtype_of("the object", object("dtype"))};
  }

 private:
  const nb::kwargs& all_;
};

/// An object of the library that can be closed. A call keeps it until it returns.
template <class Object>
class Closable {
 public:
  Closable() = default;
  explicit Closable(std::shared_ptr<Object> object) : object_(std::move(object)) {}
  Closable(Closable&&) noexcept = default;
  Closable& operator=(Closable&&) noexcept = default;
  ~Closable() { close(); }

  /// Throws `Error{invalid_usage}` once it is closed.
  std::shared_ptr<Object> get() const {
    if (object_ == nullptr) throw Error(ErrorCode::invalid_usage, "the object has been closed");
    return object_;
  }
  /// Local: tells no other rank and waits for none. What is queued runs to its end first.
  void close() {
    if (object_ == nullptr) return;
    std::shared_ptr<Object> last = std::move(object_);
    object_ = nullptr;
    nb::gil_scoped_release release;
    last.reset();
  }

 private:
  std::shared_ptr<Object> object_;
};

}  // namespace expertwire::python
