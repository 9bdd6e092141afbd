// What both modes give and take beside tensors: handles, status, the counts of a routing.

#include <cstring>

#include "objects.hpp"

namespace expertwire::python {

nb::object describe_status(const Status& status) {
  nb::dict fields;
  fields["invalid_expert_ids"] = status.invalid_expert_ids;
  fields["first_invalid_id"] = status.first_invalid_id;
  fields["dropped_rows"] = status.dropped_rows;
  fields["error"] = error_or_none(status.error);
  return make_result("Status", fields);
}

void bind_objects(nb::module_& module) {
  nb::class_<Handle>(module, "Handle", "The routing of one dispatch, needed to combine.")
      .def_prop_ro("valid", &Handle::valid);

  module.def(
      "dispatch_layout",
      [](nb::handle topk_idx, int experts, int ranks, const nb::object& communicator) {
        DispatchLayoutRequest request;
        request.topk_idx = view_of("topk_idx", topk_idx);
        request.experts = experts;
        request.ranks = ranks;
        std::shared_ptr<Communicator> held;
        if (!communicator.is_none()) {
          held = nb::cast<Closable<Communicator>&>(communicator).get();
          request.topology = &held->topology();
        }
        DispatchLayout layout;
        {
          nb::gil_scoped_release release;
          layout = dispatch_layout(request);
        }
        const nb::bytes in_rank(reinterpret_cast<const char*>(layout.is_token_in_rank.data()),
                                layout.is_token_in_rank.size());
        return nb::make_tuple(layout.tokens_per_rank, layout.tokens_per_node,
                              layout.tokens_per_expert, in_rank, layout.invalid_ids);
      },
      nb::arg("topk_idx"), nb::arg("experts"), nb::arg("ranks"),
      nb::arg("communicator") = nb::none());
}

}  // namespace expertwire::python
