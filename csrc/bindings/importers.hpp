// The importers of single protocols, and what they share.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "bindings/buffer.hpp"

struct DLPackExchangeAPI;

namespace adamax::bindings {

// NumPy's arrays, by their C struct.
void import_numpy(py::handle array, const Label& label, Access access, Buffer& buffer);

// The DLPack exchange table of a type, or null.
const DLPackExchangeAPI* exchange_table(py::handle type);
// By the table of its type; the object lends the memory as long as it lives.
void import_by_table(py::handle object, const Label& label, const DLPackExchangeAPI& table,
                     Buffer& buffer);
// By the methods __dlpack_device__ and __dlpack__.
void import_dlpack(py::handle object, const Label& label, Access access, Leases& leases,
                   Buffer& buffer);
// Whether a __cuda_array_interface__ tells the stream on which the memory is in use.
bool tells_stream(py::handle interface);
// By __cuda_array_interface__.
void import_cuda_array(py::handle interface, const Label& label, Access access, Buffer& buffer);
// By the buffer protocol.
void import_view(py::handle object, const Label& label, Access access, Leases& leases,
                 Buffer& buffer);

// `strides` may be null, for row-major memory. `unit` is the number of strides in an element: 1, or
// the size of an element for strides in bytes.
void set_layout(Buffer& buffer, const Label& label, int axes, const std::int64_t* shape,
                const std::int64_t* strides, std::int64_t unit);
void set_layout_of_bytes(Buffer& buffer, const Label& label, int axes, const py::ssize_t* shape,
                         const py::ssize_t* strides);

[[noreturn]] void throw_dtype(const Label& label, const std::string& received);
[[noreturn]] void throw_read_only(const Label& label, const char* why);
// For an object that gave no memory, by the error `cause` or by a null pointer: says which kind of
// array it is, as a ValueError, or that it may be closed, as a BufferError.
[[noreturn]] void throw_no_memory(py::handle object, const Label& label,
                                  py::error_already_set* cause = nullptr);

}  // namespace adamax::bindings
