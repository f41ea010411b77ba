"""What happens to a convolution's sums before they are stored: bias, residual, activation, their derivatives."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(h):
    return 1.0 / (1.0 + tl.exp(-h))


@triton.jit
def activate(h, slope, ACTIVATION: tl.constexpr):
    """The activation of float32 `h`; NaN stays NaN."""
    if ACTIVATION == "relu":
        result = tl.where(h < 0, 0.0, h)
    elif ACTIVATION == "leaky_relu":
        result = tl.where(h < 0, h * slope, h)
    elif ACTIVATION == "silu":
        result = h / (1.0 + tl.exp(-h))
    elif ACTIVATION == "gelu":
        result = 0.5 * h * (1.0 + tl.math.erf(h * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u)
        result = h * sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    else:
        result = h
    return result


@triton.jit
def derivative(h, slope, ACTIVATION: tl.constexpr):
    """The activation's derivative at float32 `h`, PyTorch's choice at 0."""
    if ACTIVATION == "relu":
        result = tl.where(h <= 0, 0.0, 1.0)
    elif ACTIVATION == "leaky_relu":
        result = tl.where(h > 0, 1.0, slope)
    elif ACTIVATION == "silu":
        s = sigmoid(h)
        result = s * (1.0 + h * (1.0 - s))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.math.erf(h * 0.7071067811865476))
        result = cdf + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    elif ACTIVATION == "gelu_tanh":
        s = sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
        result = s + h * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * h * h)
    else:
        result = tl.full(h.shape, 1.0, tl.float32)
    return result


@triton.jit
def image_start(n, batch, PITCH: tl.constexpr):
    """Offset of image `n` of a map; `batch` is in pixels where channels lie together, else in elements."""
    start = n * batch
    if PITCH > 0:
        start = start * PITCH
    return start


@triton.jit
def pixel_offsets(y, x, width, PITCH: tl.constexpr, SHUFFLE: tl.constexpr, WIDE: tl.constexpr):
    """The part of an element's offset inside its image that comes from the pixel.

    PITCH > 0: channels lie together, PITCH elements from pixel to pixel. PITCH = 0: planes; with SHUFFLE = r > 1 those
    of the pixel-shuffled image, r times as high and wide.
    """
    if WIDE:
        y = tl.cast(y, tl.int64)
    if PITCH > 0:
        offsets = (y * width + x) * PITCH
    else:
        offsets = y * (width * SHUFFLE * SHUFFLE) + x * SHUFFLE
    return offsets


@triton.jit
def channel_offsets(channel, pixels, width, PITCH: tl.constexpr, SHUFFLE: tl.constexpr, WIDE: tl.constexpr):
    """The part that comes from the channel; `pixels` is height * width."""
    if WIDE:
        channel = tl.cast(channel, tl.int64)
    if PITCH > 0:
        offsets = channel
    elif SHUFFLE > 1:
        colour = channel // (SHUFFLE * SHUFFLE)
        offsets = colour * (pixels * SHUFFLE * SHUFFLE)
        offsets += channel // SHUFFLE % SHUFFLE * (width * SHUFFLE) + channel % SHUFFLE
    else:
        offsets = channel * pixels
    return offsets


@triton.jit
def finish(
    acc,  # [P, C] float32
    bias,
    r,
    g,
    out,
    out2,
    y,
    x,
    inside,  # [P, 1]
    first,  # the first of the C channels
    pixels,
    width,
    slope,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    MODE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr,
    SECOND: tl.constexpr,
    R_PITCH: tl.constexpr,
    G_PITCH: tl.constexpr,
    G_SHUFFLE: tl.constexpr,
    OUT_PITCH: tl.constexpr,
    SHUFFLE: tl.constexpr,
    PADDED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Finish and store the sums `acc` of one block of channels.

    MODE "forward": act(h), with RESIDUAL "pre" act(h + r), "post" act(h) + r, "attention" (h + r)(sigmoid(h) - 1/2);
    SECOND stores h too. "gradient": g times the derivative of that at the recomputed h; SECOND stores what goes to the
    residual. "chain": (acc + r) times the activation's derivative at g, a stored h. PADDED: the result has room for
    CHANNELS rounded up to the block; zeros go there, since every mode maps zeros to zero. Maps of a smaller pitch, such
    as tensors from outside, have no zeros to read there.
    """
    channel = first + tl.arange(0, BLOCK)[None, :]
    ok = inside
    if not PADDED:
        ok = inside & (channel < CHANNELS)
    if BIAS:
        b = tl.load(bias + channel, mask=channel < CHANNELS, other=0.0)
        acc += b.to(tl.float32)
    if RESIDUAL != "none":
        r_offsets = pixel_offsets(y, x, width, R_PITCH, SHUFFLE, WIDE)
        r_offsets = r_offsets + channel_offsets(channel, pixels, width, R_PITCH, SHUFFLE, WIDE)
        r_ok = ok
        if PADDED and R_PITCH < OUT_PITCH:
            r_ok = inside & (channel < CHANNELS)
        residual = tl.load(r + r_offsets, mask=r_ok, other=0.0).to(tl.float32)
    if MODE != "forward":
        g_offsets = pixel_offsets(y, x, width, G_PITCH, G_SHUFFLE, WIDE)
        g_offsets = g_offsets + channel_offsets(channel, pixels, width, G_PITCH, G_SHUFFLE, WIDE)
        g_ok = ok
        if PADDED and G_PITCH < OUT_PITCH:
            g_ok = inside & (channel < CHANNELS)
        given = tl.load(g + g_offsets, mask=g_ok, other=0.0).to(tl.float32)
    second = acc
    if MODE == "forward":
        if RESIDUAL == "attention":
            value = (acc + residual) * (sigmoid(acc) - 0.5)
        elif RESIDUAL == "pre":
            value = activate(acc + residual, slope, ACTIVATION)
        elif RESIDUAL == "post":
            value = activate(acc, slope, ACTIVATION) + residual
        else:
            value = activate(acc, slope, ACTIVATION)
    elif MODE == "gradient":
        if RESIDUAL == "attention":
            s = sigmoid(acc)
            second = given * (s - 0.5)
            value = second + given * (acc + residual) * (s * (1.0 - s))
        elif RESIDUAL == "pre":
            value = given * derivative(acc + residual, slope, ACTIVATION)
        else:
            value = given * derivative(acc, slope, ACTIVATION)
    else:
        if RESIDUAL != "none":
            acc += residual
        value = acc * derivative(given, slope, ACTIVATION)
    offsets = pixel_offsets(y, x, width, OUT_PITCH, SHUFFLE, WIDE)
    offsets = offsets + channel_offsets(channel, pixels, width, OUT_PITCH, SHUFFLE, WIDE)
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=ok)
    if SECOND:
        tl.store(out2 + offsets, second.to(out2.dtype.element_ty), mask=ok)
