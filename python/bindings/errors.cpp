#include "common.hpp"

namespace expertwire::python {

namespace {

nb::object to_python(const Error& error) {
  return nb::module_::import_("expertwire._errors")
      .attr("BY_CODE")[static_cast<int>(error.code())](
          error.what(), error.rank(), error.peer(), std::string(to_string(error.phase())).c_str());
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
