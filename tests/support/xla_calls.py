"""Calls of XLA's handlers without XLA: the structures of its C interface, filled here.

tests/test_jax_ffi.py compares csrc/xla/ffi.hpp with XLA's own header; these are those.
"""

import ctypes

import numpy as np

INT, I64, SIZE, MEMORY = ctypes.c_int, ctypes.c_int64, ctypes.c_size_t, ctypes.c_void_p
HEAD = [("struct_size", SIZE), ("extensions", MEMORY)]
METADATA = 1  # the type of an extension
INSTANTIATE, PREPARE, INITIALIZE, EXECUTE = range(4)
BUFFER, SCALAR, STRING = 1, 3, 4
TYPES = {"int32": 4, "int64": 5, "float16": 10, "float32": 11, "float64": 12, "bfloat16": 16}
INVALID_ARGUMENT, INTERNAL = 3, 13


def structure(name, *fields, head=HEAD):
    return type(name, (ctypes.Structure,), {"_fields_": [*head, *fields]})


Version = structure("Version", ("major", INT), ("minor", INT))
Metadata = structure(
    "Metadata",
    *(("struct_size", SIZE), ("version", Version), ("traits", ctypes.c_uint32), ("state", I64)),
    head=[],
)
MetadataExtension = structure(
    "MetadataExtension",
    *(("struct_size", SIZE), ("type", INT), ("next", MEMORY), ("metadata", MEMORY)),
    head=[],
)
ErrorCreate = structure("ErrorCreate", ("message", ctypes.c_char_p), ("code", INT))
StreamGet = structure("StreamGet", ("context", MEMORY), ("stream", MEMORY))
Allocate = structure(
    "Allocate", ("context", MEMORY), ("size", SIZE), ("alignment", SIZE), ("data", MEMORY)
)
Free = structure("Free", ("context", MEMORY), ("size", SIZE), ("data", MEMORY))
DeviceOrdinalGet = structure("DeviceOrdinalGet", ("context", MEMORY), ("ordinal", ctypes.c_int32))
FUNCTIONS = {  # by their places among those of Api
    "error_create": (0, ErrorCreate),
    "stream_get": (4, StreamGet),
    "device_memory_allocate": (9, Allocate),
    "device_memory_free": (10, Free),
    "device_ordinal_get": (17, DeviceOrdinalGet),
}
Api = structure("Api", ("version", Version), ("internal", MEMORY), ("functions", MEMORY * 18))
Buffer = structure(
    "Buffer", ("dtype", INT), ("data", MEMORY), ("rank", I64), ("dims", ctypes.POINTER(I64))
)
Span = structure("Span", ("data", ctypes.c_char_p), ("size", SIZE), head=[])
Scalar = structure("Scalar", ("dtype", INT), ("value", MEMORY), head=[])
Buffers = structure(
    "Buffers", ("size", I64), ("types", ctypes.POINTER(INT)), ("buffers", ctypes.POINTER(MEMORY))
)
Attributes = structure(
    "Attributes",
    *(("size", I64), ("types", ctypes.POINTER(INT)), ("names", ctypes.POINTER(MEMORY))),
    ("values", ctypes.POINTER(MEMORY)),
)
CallFrame = structure(
    "CallFrame",
    *(("api", ctypes.POINTER(Api)), ("context", MEMORY), ("stage", INT)),
    *(("arguments", Buffers), ("results", Buffers), ("attributes", Attributes)),
    ("future", MEMORY),
)
CALLBACK = ctypes.CFUNCTYPE(MEMORY, MEMORY)
HANDLER = ctypes.CFUNCTYPE(MEMORY, ctypes.POINTER(CallFrame))
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = MEMORY, [ctypes.py_object, ctypes.c_char_p]


def handler_of(capsule):
    return HANDLER(_pointer(capsule, b"xla._CUSTOM_CALL_TARGET"))


def sized(kind, *fields):
    return kind(ctypes.sizeof(kind), None, *fields)


class Refused(Exception):
    """What a handler has returned: its message and its code."""


class Runtime:
    """What a handler can ask for; `log` has what it asked, `fails` names what fails."""

    def __init__(self, stream=7, device=0, api_size=None):
        self.stream, self.device, self.log, self.fails, self.memory = stream, device, [], (), {}
        self.api = sized(Api, sized(Version, 0, 1), None)
        self.api.struct_size = api_size or ctypes.sizeof(Api)
        self._callbacks = [
            self._install(name, *where) for name, where in FUNCTIONS.items()
        ]  # kept alive

    def _install(self, name, place, arguments):
        def call(address):
            args = arguments.from_address(address)
            assert args.struct_size == ctypes.sizeof(arguments)
            self.log.append(name)
            if name in self.fails:
                return 1
            return getattr(self, name)(args)

        callback = CALLBACK(call)
        self.api.functions[place] = ctypes.cast(callback, MEMORY).value
        return callback

    def error_create(self, args):
        self.error = Refused(args.message.decode(), args.code)
        return 1

    def stream_get(self, args):
        args.stream = self.stream

    def device_ordinal_get(self, args):
        args.ordinal = self.device

    def device_memory_allocate(self, args):
        assert args.alignment == 16
        block = np.full(args.size + 16, 0xFF, np.uint8)  # NaN for who reads it first
        args.data = -(-block.ctypes.data // 16) * 16
        self.memory[args.data] = args.size, block

    def device_memory_free(self, args):
        size, _ = self.memory[args.data]
        assert size == args.size
        self.memory[args.data][1][...] = 0xFF
        del self.memory[args.data]


def buffer_of(array):
    dims = (I64 * array.ndim)(*array.shape)
    return sized(Buffer, TYPES[array.dtype.name], array.ctypes.data, array.ndim, dims)


def array_of(kind, items):
    return (kind * max(len(items), 1))(*items)


def addresses(structures):
    return array_of(MEMORY, [ctypes.addressof(s) for s in structures])


def call(capsule, arguments, results, attributes, runtime=None, stage=EXECUTE, types=None):
    """Call a handler with arrays of NumPy; raise what it returns.

    Attributes are strings and arrays without axes. `types` replaces those of the attributes.
    """
    runtime = runtime or Runtime()
    buffers = [[buffer_of(array) for array in arrays] for arrays in (arguments, results)]
    names, values = [Span(k.encode(), len(k)) for k in attributes], []
    for value in attributes.values():
        if isinstance(value, str):
            values.append(Span(value.encode(), len(value)))
        else:
            values.append(Scalar(TYPES[value.dtype.name], value.ctypes.data))
    kinds = types or [STRING if isinstance(v, str) else SCALAR for v in attributes.values()]
    all_of = [
        sized(Buffers, len(group), array_of(INT, [BUFFER] * len(group)), addresses(group))
        for group in buffers
    ]
    attrs = sized(Attributes, len(names), array_of(INT, kinds), addresses(names), addresses(values))
    frame = sized(CallFrame, ctypes.pointer(runtime.api), None, stage, *all_of, attrs, None)
    runtime.error = None
    if handler_of(capsule)(ctypes.byref(frame)):
        raise runtime.error


def version_of(capsule):
    """Ask a handler for the version of the interface that it needs."""
    metadata = Metadata(ctypes.sizeof(Metadata), sized(Version, -1, -1))
    extension = MetadataExtension(
        ctypes.sizeof(MetadataExtension), METADATA, None, ctypes.addressof(metadata)
    )
    # No other member is told then.
    frame = CallFrame(ctypes.sizeof(CallFrame), ctypes.addressof(extension))
    assert not handler_of(capsule)(ctypes.byref(frame))
    return metadata.version.major, metadata.version.minor, metadata.traits


class Step:
    """Arrays of a step by a handler, and what it is told."""

    def __init__(self, variables, settings, count=0, arrays=()):
        """Take (param, grad) pairs; `arrays` has the settings that are arguments."""
        self.params, self.grads = map(list, zip(*variables, strict=True)) if variables else ([], [])
        kind = [np.float64 if w.dtype == np.float64 else np.float32 for w in self.params]
        self.mu, self.nu = (
            [np.zeros(w.shape, k) for w, k in zip(self.params, kind, strict=True)] for _ in range(2)
        )
        self.count = np.array(count, np.int32)
        self.arrays = list(arrays)
        settings = {"loss_scale": 1.0, **settings} if settings else {}
        self.attributes = {
            name: value if isinstance(value, str) else np.array(value, np.float64)
            for name, value in settings.items()
        }

    def call(self, capsule, runtime=None, **options):
        """Call a handler, and count as JAX does."""
        results = [*self.params, *self.mu, *self.nu]
        arguments = [*results, self.count, *self.grads, *self.arrays]
        call(capsule, arguments, results, self.attributes, runtime, **options)
        if options.get("stage", EXECUTE) == EXECUTE:
            self.count += self.count < 2**31 - 1
