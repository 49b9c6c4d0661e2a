"""The same few operators in the many ways in which code bases write them: each was refused, wrong or a window once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Entry, Graph, Reference, long_clip, seeded
from .copied_gates import COPIED_GATES
from .window_styles import WINDOW_STYLES

_VIDEO = (1, 3, 6, 6, 6)
_SERIES = (1, 4, 12)
_TOKENS = (1, 8, 12)
POOL = nn.MaxPool3d((1, 1, 3), (1, 1, 1), (0, 0, 1))  # of (N, C, T, W), which it takes for (C, T, H, W)


def conv(i: int = 3, o: int = 4) -> nn.Conv3d:
    return nn.Conv3d(i, o, 3, padding=1)


# --- what streams


def shift_in_place(_: Any, x: Tensor) -> Tensor:
    """TSM's shift as its authors write it: into zeros, slice by slice. (N, T, C, H, W)."""
    out = torch.zeros_like(x)
    out[:, :-1, :2] = x[:, 1:, :2]
    out[:, 1:, 2:4] = x[:, :-1, 2:4]
    out[:, :, 4:] = x[:, :, 4:]
    return out


def frames(m: Any, x: Tensor) -> Tensor:
    """The layer ``net`` on each frame of (N, T, C, H, W)."""
    y = m.net(x.flatten(0, 1))
    return y.view(x.shape[0], -1, *y.shape[1:])


def tokens(m: Any, x: Tensor) -> Tensor:
    """Attention over the places of each frame: operands of rank 5."""
    y = m.embed(x.permute(0, 2, 3, 4, 1).flatten(2, 3))
    q, k, v = (z.unflatten(-1, (2, -1)).transpose(2, 3) for z in m.qkv(y).chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(3).mean(2)


def by_index(m: Any, x: Tensor) -> Tensor:
    """Each frame read and written at indices of its own: a histogram, the strongest channels, a place in a table."""
    y = m.net(x)
    bins = (y.sigmoid() * 3.99).long()
    counts = torch.zeros(x.shape[0], 4, *x.shape[2:]).scatter_add(1, bins, torch.ones_like(y))
    strongest = torch.zeros_like(y).scatter(1, y.argmax(1, keepdim=True), 1.0)
    table = torch.bucketize(y, torch.tensor([-0.5, 0.0, 0.5])) + torch.searchsorted(torch.tensor([0.1, 0.2]), y)
    return m.out(torch.cat([counts, strongest, y.gather(1, y.argsort(1)), table / 3], 1))


def by_index_in_frames(m: Any, x: Tensor) -> Tensor:
    """The same of frames in the batch; a pool that says where the maxima were. (N, T, C, H, W)."""
    y = m.net(x.flatten(0, 1))
    pooled, where = F.max_pool2d(y, 2, return_indices=True)
    beside = torch.zeros(y.shape[0], 4, *y.shape[2:]).scatter_reduce(1, y.argsort(1), y, "amax")
    y = m.out(F.max_unpool2d(pooled, where, 2) + beside + y.quantile(0.3, dim=1, keepdim=True))
    return y.view(x.shape[0], -1, *y.shape[1:])


def codebook(m: Any, x: Tensor) -> Tensor:
    """The nearest vectors of a codebook, a table with a row for each of two numbers, one by its last dim."""
    z = m.net(x).movedim(1, -1)
    nearest = (z.unsqueeze(-2) - m.codes.weight).square().sum(-1).argmin(-1)
    level = (z[..., 0].sigmoid() * 3.99).long() - 4
    beside = m.table.weight.unflatten(0, (8, 4))[nearest, level]
    turned = m.codes.weight.t()[:, nearest].movedim(0, -1)
    return m.out((m.codes.weight[nearest] + beside + turned).movedim(-1, 1))


def lifted(m: Any, x: Tensor) -> Tensor:
    """A lifting step: entries by turns, written back into one tensor; then zeros put between them."""
    even, odd = x[..., ::2], x[..., 1::2]
    odd = odd - m.net(even)
    both = torch.zeros_like(x)
    both[..., ::2] = even + m.net(odd)
    both[..., 1::2] = odd
    apart = torch.zeros(x.shape[0], x.shape[1], 2 * x.shape[2])
    apart[..., ::2] = both
    return m.out(apart)


def neighbours(m: Any, x: Tensor) -> Tensor:
    """A loop over frames, each beside the one before and the one behind it; what it collects is convolved."""
    last = x.shape[2] - 1
    near = ([x[:, :, max(t - 1, 0)], x[:, :, t], x[:, :, min(t + 1, last)]] for t in range(last + 1))
    return m.out(torch.stack([m.net(torch.cat(three, 1)) for three in near], 2))


def collected(m: Any, x: Tensor) -> Tensor:
    """A loop over frames that are cut out, added one by one to what is there: nothing at first."""
    y = torch.tensor([])
    for t in range(x.shape[2]):
        y = torch.cat([y, m.net(x[:, :, t : t + 1].squeeze(2)).flatten(1).unsqueeze(2)], 2)
    return m.out(y)


def written_frames(m: Any, x: Tensor) -> Tensor:
    """A loop over frames that writes what it computes into a tensor that was made before."""
    y = x.new_empty(x.shape[0], x.shape[2], 16)
    for t in range(x.shape[2]):
        y[:, t] = m.net(x[:, :, t]).flatten(1)
    return m.out(y.mT)


def in_memory(m: Any, x: Tensor) -> Tensor:
    """Neighbouring frames by the strides of memory, where time lies outside, and every other of two by two."""
    y = m.net(x).transpose(1, 2)
    n, t, c, h, w = y.shape
    a, b, *rest = y.stride()
    pairs = y.as_strided((n, t - 1, c, h, w, 2), (a, b, *rest, b)).mean(-1)
    return m.out(pairs.as_strided((n, t - 2, 3, h, w), pairs.stride(), pairs.stride()[1]).transpose(1, 2))


def frame_by_frame(m: Any, x: Tensor) -> Tensor:
    """A loop over frames, and a recurrent layer that takes time first."""
    y, _ = m.gru(torch.stack([m.net(x[:, :, t]) for t in range(x.shape[2])], 0).flatten(2))
    return m.out(y.permute(1, 0, 2))


def choices(m: Any, x: Tensor) -> Tensor:
    y = m.net(x)
    both = ((y > 0) & (x.mean(1, keepdim=True) < 0)).to(y.dtype)
    return torch.cat([torch.where(y > 0.1, y, 0.3 * y), y.masked_fill(y <= -0.2, 0.5), (y >= 0) * y, both], 1)


def written(m: Any, x: Tensor) -> Tensor:
    y = m.net(x)
    y += 1
    y[:, 0] = 0
    y[:, :, :, 0, 0] = 1
    return m.out(y.relu_())


def statistics(m: Any, x: Tensor) -> Tensor:
    y = m.net(x)
    return torch.cat([y.std((3, 4)), torch.var_mean(y, (3, 4))[0], F.normalize(y, dim=1).amax((3, 4))], 1)


def sampled(m: Any, x: Tensor) -> Tensor:
    """Each frame warped by offsets made of itself."""
    y = x.flatten(0, 1)
    return F.grid_sample(y, m.net(y).tanh().permute(0, 2, 3, 1), align_corners=False).view(x.shape)


def sampled_evenly(m: Any, x: Tensor) -> Tensor:
    """All frames warped alike, and then each by offsets made of itself from the places of a constant grid."""
    y = x.flatten(0, 1)
    grid = F.affine_grid(0.9 * torch.eye(2, 3).repeat(y.shape[0], 1, 1), list(y.shape), align_corners=False)
    y = F.grid_sample(y, grid, align_corners=False)
    y = F.grid_sample(y, grid + m.net(y).tanh().permute(0, 2, 3, 1), align_corners=False)
    return torch.cat([y, torch.ones_like(y[:, :1])], 1).unflatten(0, x.shape[:2])


def distances(m: Any, x: Tensor) -> Tensor:
    """How far each place of each frame is from learned centres; time is folded into the places."""
    return torch.cdist(m.net(x).flatten(2).mT, m.centres.weight).unflatten(1, (x.shape[2], -1)).mean(2)


def class_token(m: Any, x: Tensor) -> Tensor:
    """A learned token beside those of each frame, places beside colours, one matrix for all frames."""
    line = torch.linspace(-1, 1, 6).expand(x.shape[0], 1, *x.shape[2:])
    y = m.net(torch.cat([x, line], 1)).transpose(1, 2).flatten(0, 1).flatten(2)
    y = torch.bmm(m.mix.weight.expand(y.shape[0], -1, -1), y).mT
    tokens = torch.cat([m.token.weight.repeat(y.shape[0], 1, 1), y], 1)
    return m.attend(tokens)[:, 0].unflatten(0, (x.shape[0], -1))


def repeated_end(m: Any, x: Tensor) -> Tensor:
    """Differences of neighbours, the last of them twice."""
    y = m.net(x)
    d = y[:, :, 1:] - y[:, :, :-1]
    return m.out(torch.cat([y, torch.cat([d, d[:, :, -1:]], 2)], 1))


def moving_average(m: Any, x: Tensor) -> Tensor:
    """A series and its trend, as forecasting models split it: the entries at both ends are repeated."""
    padded = torch.cat([x[:, :, :1].repeat(1, 1, 2), x, x[:, :, -1:].expand(-1, -1, 2)], 2)
    trend = F.avg_pool1d(padded, 5, 1)
    return m.out(torch.cat([x - trend, trend], 1))


def zeros_beside(m: Any, x: Tensor) -> Tensor:
    """The parameter-free shortcut of 3D ResNets: pooled, and zeros for the channels it lacks. It reads ``.data``."""
    y = m.net(x)
    short = F.avg_pool3d(x, 1, stride=1)
    return F.relu(y + torch.cat([short.data, torch.zeros(short.size(0), 1, *short.shape[2:])], dim=1))


def called_with_lengths(m: Any, x: Tensor) -> Tensor:
    """Calls layers of any kind with lengths of the clips, and those that take none without them."""
    for layer in (m.net, m.out):
        try:
            x = layer(x, lengths=None)
        except TypeError:
            x = layer(x)
    return x


def decided_by_constants(m: Any, x: Tensor) -> Tensor:
    """Python that reads the values of ranges and masks, which no frame can change."""
    y, weight = m.net(x), torch.ones(4)
    weight[2:] = 0.5
    weight[-1] += 1
    y = y * weight.view(4, 1, 1, 1) if (weight != 1).any() else y
    return torch.stack([y[:, int(i)] for i in torch.linspace(0, 3, 2)] + [y[:, k] for k in weight.long().tolist()], 1)


def decided(y: Tensor) -> Tensor:
    """The same with the decisions made by hand."""
    y = y * torch.tensor([1, 1, 0.5, 1.5]).view(4, 1, 1, 1)
    return y[:, [0, 3, 1, 1, 0, 1]]


def decided_by_buffers(m: Any, x: Tensor) -> Tensor:
    """Python that reads the values of buffers and weights, one of which is added to an activation; sizes by them."""
    y = m.norm(m.net(x))
    y += m.norm.bias.sum()
    more = m.norm.num_batches_tracked + 2
    y = F.pad(y, (more, more // 2, 0, 0))[..., more : y.shape[-1] + more]
    return y * 2 if (m.norm.running_var > 0).all() and m.norm.weight.sum() != 0 else y[:, :1]


def copies_around(m: Any, x: Tensor) -> Tensor:
    """Copies of entries around what is there: of frames and in space, and over features alone. Windows of these."""
    y = F.pad(m.net(x), (1, 2, 3, 0, 1, 1), mode="reflect")
    y = y + F.pad(F.pad(y, (0, 0, 1, 1, 0, 0), mode="reflect"), (1, 1, 0, 0, 0, 0), mode="replicate").mean((3, 4), True)
    y = F.pad(F.pad(y, (0, 1, 2, 0, 1, 1), mode="replicate").mean(4), (2, 1, 1, 0), mode="reflect")
    y = F.pad(y, (1, 0, 0, 2), mode="replicate")[:, 0]
    y = F.pad(F.pad(y, (1, 2), mode="reflect"), (2, 1), mode="replicate").unfold(2, 4, 3).amax(-1)
    return torch.stack([y, y * 2, y * 3], 1).unfold(1, 2, 1).mean(-1)


_STREAMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "slope_per_channel": (lambda: nn.Sequential(nn.Conv1d(4, 5, 3, padding=1), nn.PReLU(5)), _SERIES, 2),
    "tensor_unfold": (
        lambda: Graph(lambda m, x: m.fc(F.pad(x, (2, 0)).unfold(2, 3, 1).permute(0, 2, 1, 3).flatten(2)).mT,
                      fc=nn.Linear(12, 5)), _SERIES, 2),
    "module_unfold": (
        lambda: Graph(lambda m, x: m.fc(F.unfold(x.unsqueeze(2), (1, 3), padding=(0, 1)).mT).mT,
                      fc=nn.Linear(12, 5)), _SERIES, 2),
    "circular": (
        lambda: nn.Sequential(conv(), nn.Conv3d(4, 4, 3, padding=1, padding_mode="circular")), _VIDEO, 2),
    "shift_in_place": (
        lambda: Graph(lambda m, x: frames(m, shift_in_place(m, x)), net=nn.Conv2d(8, 4, 3, padding=1)),
        (1, 8, 8, 4, 4), 1),
    "copies_around": (lambda: Graph(copies_around, net=conv()), _VIDEO, 2),
    "written": (lambda: Graph(written, net=conv(), out=conv(4, 3)), _VIDEO, 2),
    "choices": (lambda: Graph(choices, net=conv()), _VIDEO, 2),
    "statistics": (lambda: Graph(statistics, net=conv()), _VIDEO, 2),
    "channels_repeated": (lambda: Graph(lambda m, x: m.out(m.net(x).repeat(1, 2, 1, 1, 1)), net=conv(), out=conv(8, 4)),
                          _VIDEO, 2),
    "factor_not_whole": (
        lambda: Graph(lambda m, x: F.interpolate(m.net(x), scale_factor=(1, 1.5, 1.5)), net=conv()),
        (1, 3, 6, 7, 7), 2),
    "resized_frames": (
        lambda: Graph(lambda m, x: F.interpolate(m.net(x), scale_factor=(2, 1.5, 1.5), mode="trilinear"),
                      net=conv()), _VIDEO, 2),
    "sorted_channels": (lambda: Graph(lambda m, x: m.out(m.net(x).sort(1)[0]), net=conv(), out=conv(4, 3)), _VIDEO, 2),
    "stacked_channels": (
        lambda: Graph(lambda m, x: torch.stack([m.net(x)[:, i] for i in (2, 0, 1)], 1), net=conv()), _VIDEO, 2),
    "best_places": (lambda: Graph(lambda m, x: m.net(x).flatten(3).topk(3, -1)[0].mean(-1), net=conv()), _VIDEO, 2),
    "by_index": (lambda: Graph(by_index, net=conv(), out=conv(16, 3)), _VIDEO, 2),
    "by_index_in_frames": (
        lambda: Graph(by_index_in_frames, net=nn.Conv2d(3, 4, 3, padding=1), out=nn.Conv2d(4, 3, 3, padding=1)),
        (1, 6, 3, 6, 6), 1),
    "codebook": (
        lambda: Graph(codebook, net=conv(), out=conv(4, 3),
                      codes=nn.Linear(4, 8, False), table=nn.Linear(4, 32, False)),
        _VIDEO, 2),
    "lifted": (lambda: Graph(lifted, net=nn.Conv1d(4, 4, 3, padding=1), out=nn.Conv1d(4, 3, 3, padding=1)), _SERIES, 2),
    "sampled_frames": (lambda: Graph(sampled, net=nn.Conv2d(3, 2, 3, padding=1)), (1, 6, 3, 6, 6), 1),
    "sampled_evenly": (lambda: Graph(sampled_evenly, net=nn.Conv2d(3, 2, 3, padding=1)), (1, 6, 3, 6, 6), 1),
    "class_token": (
        lambda: Graph(class_token, net=conv(4, 4), mix=nn.Linear(4, 4), token=nn.Linear(4, 1),
                      attend=nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)), _VIDEO, 2),
    "distances": (lambda: Graph(distances, net=conv(), centres=nn.Linear(4, 5)), _VIDEO, 2),
    "repeated_end": (lambda: Graph(repeated_end, net=conv(), out=conv(8, 3)), _VIDEO, 2),
    "tokens_of_frames": (lambda: Graph(tokens, embed=nn.Linear(3, 8), qkv=nn.Linear(8, 24)), _VIDEO, 2),
    "norms_of_frames": (
        lambda: Graph(frames, net=nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.GELU(),
                                                nn.InstanceNorm2d(8, affine=True), nn.Conv2d(8, 4, 3))),
        (1, 6, 3, 8, 8), 1),
    "moving_average": (lambda: Graph(moving_average, out=nn.Conv1d(8, 3, 1)), _SERIES, 2),
    "zeros_beside": (lambda: Graph(zeros_beside, net=conv()), _VIDEO, 2),
    "zeros_before_max_pool": (  # what is pooled is below zero
        lambda: Graph(lambda m, x: F.max_pool3d(F.pad(m.net(x) - 9, (0, 1, 0, 1)), (1, 3, 3), (1, 2, 2)), net=conv()),
        _VIDEO, 2),
    "neighbours": (
        lambda: Graph(neighbours, net=nn.Conv2d(9, 4, 3, padding=1), out=conv(4, 3)), _VIDEO, 2),
    "collected": (
        lambda: Graph(collected, net=nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU()),
                      out=nn.Conv1d(16, 3, 3, padding=1)), _VIDEO, 2),
    "written_frames": (
        lambda: Graph(written_frames, net=nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU()),
                      out=nn.Conv1d(16, 3, 3, padding=1)), _VIDEO, 2),
    "in_memory": (lambda: Graph(in_memory, net=conv(), out=conv(3, 2)), _VIDEO, 2),
    "sampled_down": (
        lambda: Graph(lambda m, x: m.out(F.interpolate(m.net(x), scale_factor=0.5, mode="trilinear")),
                      net=conv(), out=conv(4, 3)), (1, 3, 12, 6, 6), 2),
    "sampled_down_nearest": (
        lambda: Graph(lambda m, x: m.out(F.interpolate(m.net(x), scale_factor=(1 / 3, 1, 2), mode="nearest-exact")),
                      net=conv(), out=conv(4, 3)), (1, 3, 12, 6, 6), 2),
    "resized_pictures": (
        lambda: Graph(frames, net=nn.Sequential(Graph(lambda _, x: F.interpolate(x, (5, 5), mode="bilinear",
                                                                               antialias=True)), nn.Conv2d(3, 4, 3))),
        (1, 6, 3, 8, 8), 1),
    "bilinear_layer": (
        lambda: Graph(lambda m, x: m.fc(m.net(x).mT, x.mT).mT, net=nn.Conv1d(4, 5, 3, padding=1),
                      fc=nn.Bilinear(5, 4, 3)), _SERIES, 2),
    "called_with_lengths": (lambda: Graph(called_with_lengths, net=conv(), out=conv(4, 3)), _VIDEO, 2),
    "pool_of_pictures": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), POOL, nn.Conv2d(4, 3, 3), POOL), (1, 3, 12, 9), 2),
    "random_slope": (lambda: nn.Sequential(conv(), nn.RReLU(), conv(4, 3)), _VIDEO, 2),
}  # fmt: skip


def _streaming(name: str) -> Entry:
    make, shape, dim = _STREAMS[name]
    out = 1 if dim == 1 or name in ("tokens_of_frames", "distances", "class_token") else 2
    return Entry(name, seeded(make, shape), (shape,), time_dim=dim, reference=long_clip(out))


def highest(m: Any, x: Tensor) -> Tensor:
    """The largest of all entries so far."""
    return m.out(x.cummax(1)[0])


STYLES = (
    Entry(
        "highest_so_far",
        seeded(lambda: Graph(highest, out=nn.Linear(12, 3)), _TOKENS),
        (_TOKENS,),
        time_dim=1,
        reference=long_clip(1),
        causal=True,
        nan_start=False,
    ),
    *COPIED_GATES,
    *(_streaming(name) for name in _STREAMS),
    Entry(
        "decided_by_constants",
        seeded(lambda: Graph(decided_by_constants, net=conv()), _VIDEO),
        (_VIDEO,),
        reference=lambda m: Reference(lambda x: decided(m.net(x)), time_dims=(2,)),
    ),
    Entry(
        "decided_by_buffers",
        seeded(lambda: Graph(decided_by_buffers, net=conv(), norm=nn.BatchNorm3d(4)), _VIDEO),
        (_VIDEO,),
        reference=lambda m: Reference(lambda x: (m.norm(m.net(x)) + m.norm.bias.sum()) * 2, time_dims=(2,)),
    ),
    Entry(
        "frame_by_frame",
        seeded(
            lambda: Graph(frame_by_frame, net=nn.Conv2d(3, 2, 3, 2, 1), gru=nn.GRU(18, 5), out=nn.Linear(5, 3)), _VIDEO
        ),
        (_VIDEO,),
        causal=True,
        nan_start=False,
        reference=long_clip(1),
    ),
    *WINDOW_STYLES,
)
