// DLPack: a type's C exchange table, or the method of an object.
#pragma once

#include "bindings/buffer.hpp"

struct DLPackExchangeAPI;

namespace adamax::bindings {

// The table of a type, or null.
const DLPackExchangeAPI* exchange_table(py::handle type);

// Imports an object by the table of its type; it lends the memory as long as it lives.
void import_by_table(py::handle object, const Label& label, const DLPackExchangeAPI& table,
                     Buffer& buffer);

// Imports an object by its methods __dlpack_device__ and __dlpack__.
void import_dlpack(py::handle object, const Label& label, Access access, Leases& leases,
                   Buffer& buffer);

}  // namespace adamax::bindings
