#include "common.hpp"

namespace expertwire::python {

namespace {

/// The class of expertwire._errors for a code.
const char* class_of(ErrorCode code) {
  switch (code) {
    case ErrorCode::invalid_argument:
      return "InvalidArgument";
    case ErrorCode::invalid_usage:
      return "InvalidUsage";
    case ErrorCode::mismatch:
      return "Mismatch";
    case ErrorCode::capacity:
      return "CapacityError";
    case ErrorCode::timeout:
      return "Timeout";
    case ErrorCode::peer_lost:
      return "PeerLost";
    case ErrorCode::refused:
      return "Refused";
    case ErrorCode::unsupported:
      return "Unsupported";
    case ErrorCode::system:
      return "SystemFailure";
    case ErrorCode::failed_earlier:
      return "FailedEarlier";
  }
  return "Error";
}

nb::object to_python(const Error& error) {
  return nb::module_::import_("expertwire._errors")
      .attr(class_of(error.code()))(error.what(), error.rank(), error.peer(),
                                    std::string(to_string(error.phase())).c_str());
}

}  // namespace

nb::object error_or_none(const std::optional<Error>& error) {
  return error ? to_python(*error) : nb::none();
}

void bind_errors(nb::module_&) {
  nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
    try {
      std::rethrow_exception(thrown);
    } catch (const Error& error) {
      const nb::object python = to_python(error);
      PyErr_SetObject(python.type().ptr(), python.ptr());
    }
  });
}

}  // namespace expertwire::python
