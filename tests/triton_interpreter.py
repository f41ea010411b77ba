"""Makes Triton's interpreter treat bfloat16, masks and loop bounds the way compiled kernels do, and makes it faster."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

# What install() replaced, by method name; empty until it has replaced something.
ORIGINALS: dict[str, Callable[..., Any]] = {}


def install() -> None:
    """Patch the interpreter of Triton 3.6 to 3.9; without Triton or TRITON_INTERPRET=1 nothing happens."""
    if ORIGINALS or os.environ.get("TRITON_INTERPRET", "").lower() not in ("1", "true", "yes", "on", "y"):
        return
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    import numpy as np

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def is_bf16(x: Any) -> bool:
        # Elsewhere than in uint16 bit patterns the interpreter would have computed with the values themselves.
        return isinstance(x, handle) and x.data.dtype.char == "H" and x.dtype.scalar == tl.bfloat16

    def decode(x: Any) -> Any:
        if not is_bf16(x):
            return x
        return handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def encode(x: Any) -> Any:
        bits = np.ascontiguousarray(x.data, dtype=np.float32).view(np.uint32).reshape(x.data.shape)
        nearest_even = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        # The payload of a NaN may lie in the low half alone: the quiet bit keeps it from becoming an infinity.
        quiet_nan = (bits >> 16) | 0x40
        return handle(np.where(np.isnan(x.data), quiet_nan, nearest_even).astype(np.uint16), tl.bfloat16)

    def arithmetic(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            half = any(map(is_bf16, args))
            result = original(self, *map(decode, args), **kwargs)
            if result.data.dtype == np.bool_:
                # A comparison is handed on as its operands' type. Broadcasting a scalar one would then make a mask of
                # that type, which Triton 3.9 rejects, and casting one to bfloat16 would take it for floats.
                return handle(result.data, tl.int1)
            return encode(result) if half else result

        return method

    def cast(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(self: Any, src: Any, dst_type: Any) -> Any:
            half = dst_type.scalar == tl.bfloat16
            # Overflow to infinity and signalling NaNs are nothing to warn of, but an integer of a NaN is.
            quiet = {"over": "ignore", "invalid": "ignore"} if dst_type.scalar.is_floating() else {}
            with np.errstate(**quiet):
                result = original(self, decode(src), tl.float32 if half else dst_type)
            return encode(result) if half else result

        return method

    def dot(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(self: Any, a: Any, b: Any, d: Any, *args: Any, **kwargs: Any) -> Any:
            a, b = decode(a), decode(b)
            if d.data.dtype == np.float32 and {a.data.dtype.char, b.data.dtype.char} <= {"e", "f"}:
                # matmul(dtype=), which the interpreter calls, does without BLAS.
                product = np.matmul(a.data.astype(np.float32, copy=False), b.data.astype(np.float32, copy=False))
                return handle(product + d.data, d.dtype.scalar)
            return original(self, a, b, d, *args, **kwargs)

        return method

    def reduction(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(self: Any, tensors: Any) -> Any:
            half = [t.dtype == tl.bfloat16 for t in tensors]
            if not any(half):
                return original(self, tensors)
            results = original(self, tuple(t.to(tl.float32) if h else t for t, h in zip(tensors, half, strict=True)))
            if not isinstance(results, (tuple, list)):
                results = (results,)
            return tuple(r.to(tl.bfloat16) if h else r for r, h in zip(results, half, strict=False))

        return method

    def language(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def patch_lang_tensor(tensor: Any, scope: Any) -> None:
            original(tensor, scope)
            # Scalars are arrays of one element, which NumPy 2.4 no longer converts to an int for range() of Triton 3.6.
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        return patch_lang_tensor

    patched: set[frozenset[int]] = set()
    # What replaces what in the language, by the modules whose names it goes by: looking through them for every launch
    # would take longer than most launches.
    replacements: dict[frozenset[int], list[tuple[Any, str, Any]]] = {}

    def once(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def patch_lang(fn: Any) -> Any:
            # Every call of a device function would look through the whole language again.
            modules = frozenset(id(v) for v in fn.__globals__.values() if v is tl or v is tl.core)
            if modules in patched:
                return interpreter._LangPatchScope()
            first = not patched
            patched.add(modules)
            if first and modules in replacements:
                scope = interpreter._LangPatchScope()
                for owner, name, value in replacements[modules]:
                    scope.set_attr(owner, name, value)
                return scope
            scope = original(fn)
            if first:
                replacements[modules] = [(owner, name, vars(owner)[name]) for owner, name, _ in scope._changes]
            return scope

        return patch_lang

    def numpy_dtype(original: Callable[..., Any]) -> Callable[..., Any]:
        known: dict[str, Any] = {}

        @functools.wraps(original)
        def get(dtype: Any) -> Any:
            scalar = dtype.scalar
            name = "pointer" if scalar.is_ptr() else scalar.name
            if name not in known:
                known[name] = original(dtype)
            return known[name]

        return get

    def replace(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        ORIGINALS[f"{owner.__name__.rpartition('.')[2]}.{name}"] = getattr(owner, name)
        setattr(owner, name, wrap(getattr(owner, name)))

    for name in ("binary_op", "ternary_op", "unary_op", "create_fma"):
        replace(builder, name, arithmetic)
    replace(builder, "cast_impl", cast)
    replace(builder, "create_dot", dot)
    for owner in (interpreter.ReduceOps, interpreter.ScanOps):
        replace(owner, "apply_impl", reduction)
    replace(interpreter, "_patch_lang_tensor", language)
    replace(interpreter, "_patch_lang", once)
    replace(interpreter, "_get_np_dtype", numpy_dtype)

    def silenced(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            patched.clear()
            # A GPU's infinities and NaNs come without a word.
            with np.errstate(all="ignore"):
                return original(*args, **kwargs)

        return run

    replace(interpreter.GridExecutor, "__call__", silenced)
    # Its checks for integer overflow take half of the time and report nothing.
    current = interpreter.interpreter_builder
    current.options = dataclasses.replace(current.options, sanitize_overflow=False)
    if not hasattr(builder, "get_bf16"):
        # Without it tl.full cannot make a bfloat16 tensor of anything but zero.
        builder.get_bf16 = lambda self, value: encode(self.get_fp32(value))
    _share_types(replace)


def _share_types(replace: Callable[..., None]) -> None:
    """Every value has a type, and every operation compares some: a type is made once, and what nobody asks for never.

    Without this, two thirds of the interpreter's time go into types, their names and their sizes.
    """
    from triton.language import core, semantic

    def made_when_asked_for(owner: Any, make: Callable[[Any], Any]) -> None:
        # An attribute that instances may have of their own goes before it.
        owner.type = functools.cached_property(make)
        owner.type.__set_name__(owner, "type")

    def tuple_of(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def init(self: Any, args: Any, type: Any = None) -> None:
            if type is None:
                self.values = list(args)
            else:
                original(self, args, type)

        return init

    replace(core.tuple, "__init__", tuple_of)
    made_when_asked_for(core.tuple, lambda self: core._type_for_tuple_values(self.values))

    def constant(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def init(self: Any, value: Any) -> None:
            while isinstance(value, core.constexpr):
                value = value.value
            self.value = value

        return init

    replace(core.constexpr, "__init__", constant)
    made_when_asked_for(core.constexpr, lambda self: core.constexpr_type(self.value))

    blocks: dict[tuple[Any, ...], Any] = {}

    def shared_block(cls: Any, element: Any, shape: Any) -> Any:
        sides = tuple(s.value if isinstance(s, core.constexpr) else s for s in shape)
        # Names of pointers do not tell their address space.
        key = (element.name, getattr(element, "address_space", None), sides)
        if key not in blocks:
            self = object.__new__(cls)
            initialize(self, element, shape)
            self.tensor_shape = core.tuple([core.constexpr(s) for s in self.shape])
            self.tensor_size = core.constexpr(self.numel)
            blocks[key] = self
        return blocks[key]

    def initialized(_original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *args: None

    initialize = core.block_type.__init__
    core.block_type.__new__ = shared_block
    replace(core.block_type, "__init__", initialized)
    no_sides, one = core.tuple([]), core.constexpr(1)

    def tensor_of(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def init(self: Any, handle: Any, type: Any) -> None:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            if type.is_block():
                self.shape, self.numel = type.tensor_shape, type.tensor_size
            else:
                self.shape, self.numel = no_sides, one

        return init

    replace(core.tensor, "__init__", tensor_of)

    def equal(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def eq(self: Any, other: Any) -> Any:
            return self is other or original(self, other)

        return eq

    for owner in (core.dtype, core.pointer_type, core.block_type):
        replace(owner, "__eq__", equal)

    def broadcast(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(self: Any, lhs: Any, rhs: Any) -> Any:
            a, b = lhs.type, rhs.type
            if a is b or (a.is_block() and b.is_block() and a.shape.values == b.shape.values):
                return lhs, rhs
            return original(self, lhs, rhs)

        return method

    replace(semantic.TritonSemantic, "broadcast_impl_value", broadcast)
