"""SSPNet: scale and spatial priors guided pedestrian attribute recognition, Sec. 3 of the paper, in its order.

Everything here needs torch and torchvision alone, so this file, or one class of it, can be copied.

    Backbone, FPN          the feature pyramid P1, P2, P3 at strides 4, 8, 16       (Sec. 3.2.1)
    AFSS                   adaptive feature scale selection                         (Sec. 3.2.2, Eq. 4)
    PLE_R, PLE_K, PLE_S    prior location extraction                                (Sec. 3.2.3, Eq. 5-9)
    pyramid_pool           feature aggregation Psi_agr                              (Eq. 5, 7, 9)
    SSPNet, Baseline       the model of Eq. 1 and the Strong Baseline it is held against
    HierarchicalLoss       weighted binary cross-entropy                            (Sec. 3.2.4, Eq. 10-12)
    label_counts, mean_accuracy                                                     (Sec. 4.1, Eq. 14)

Shapes: B images, C channels, H x W a feature map, N points, M offset points, L attributes, S scales.
Points are (x, y) in pixels of the map or image they are given for, with pixel centres at whole numbers.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model

GROUPS = ("head", "torso", "bottom", "all")
SCALES = ("P1", "P2", "P3")
STRIDES = (4, 8, 16)  # of P1, P2, P3 in the image

# Tab. A.11: the rows of each group's prior region as shares of the map's height, full width.
PRIOR_REGIONS = {"head": (0, 3 / 8), "torso": (1 / 8, 5 / 8), "bottom": (1 / 2, 1), "all": (0, 1)}

# Tab. A.12, in MPII order: 0 r-ankle 1 r-knee 2 r-hip 3 l-hip 4 l-knee 5 l-ankle 6 pelvis 7 thorax 8 upper neck
# 9 head top 10 r-wrist 11 r-elbow 12 r-shoulder 13 l-shoulder 14 l-elbow 15 l-wrist
KEYPOINT_GROUPS = {
    "head": (7, 8, 9, 12, 13),
    "torso": (2, 3, 6, 10, 11, 12, 13, 14, 15),
    "bottom": (0, 1, 2, 3, 4, 5, 6),
    "all": tuple(range(16)),
}


# ---- feature pyramid (Sec. 3.2.1) ----


class Backbone(nn.Module):
    """A torchvision ResNet or Swin Transformer, read at C2..C5 (strides 4, 8, 16, 32).

    Args:
        name: torchvision's name, one of `Backbone.names`.
        weights: "imagenet" (torchvision's IMAGENET1K_V1, fetched once), a file with a state dict of that
            torchvision model (its classifier may be missing), or None for random weights.
        taps: which of C2..C5 `forward` returns.

    Raises:
        ValueError: unknown name, or a weights file whose tensors do not fit.
    """

    names = ("resnet18", "resnet34", "resnet50", "resnet101", "swin_t", "swin_s", "swin_b")

    def __init__(self, name="resnet50", weights=None, taps=("C2", "C3", "C4", "C5")):
        super().__init__()
        if name not in self.names:
            raise ValueError(f"backbone {name!r}: expected one of {', '.join(self.names)}")
        net = get_model(name, weights="IMAGENET1K_V1" if weights == "imagenet" else None)
        if weights not in (None, "imagenet"):
            load_weights(net, weights, ("fc.", "head."))
        self.swin = name.startswith("swin")
        # Where pixel k of a map of stride s looks: Swin's patches at the middle of image pixels s k .. s k + s - 1,
        # ResNet's strided convolutions, padded on both sides, at image pixel s k.
        self.centred = self.swin
        if self.swin:
            stages = [net.features[i : i + 2] for i in range(0, 8, 2)]  # (patch embedding or merging, blocks)
            channels = [stage[1][-1].norm1.normalized_shape[0] for stage in stages]
        else:
            stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
            stages = [nn.Sequential(stem, net.layer1), net.layer2, net.layer3, net.layer4]
            channels = [(b.conv3 if hasattr(b, "conv3") else b.conv2).out_channels
                        for b in (net.layer1[-1], net.layer2[-1], net.layer3[-1], net.layer4[-1])]
        self.stages = nn.ModuleList(stages)
        self.taps = [int(tap[1]) - 2 for tap in taps]
        self.out_channels = [channels[tap] for tap in self.taps]
        if self.swin:  # Swin's stages end un-normalized; its own last norm serves C5, new ones the other taps
            self.norms = nn.ModuleDict({str(t): net.norm if t == 3 else nn.LayerNorm(channels[t]) for t in self.taps})

    def forward(self, images):
        """(B, 3, H, W) -> a list with one (B, C, H/stride, W/stride) map per tap."""
        maps, x = [], images
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.taps:
                maps.append(self.norms[str(i)](x).permute(0, 3, 1, 2) if self.swin else x)
        return maps


def load_weights(net, file, ignore=()):
    """Loads a state dict file into a network, names and shapes alike; names that start with one of `ignore` are left out."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the zip reader and the restricted unpickler raise many kinds
        raise ValueError(f"{file}: not a readable state dict ({str(error).strip().splitlines()[0]})") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    state = {k: v for k, v in state.items() if not k.startswith(ignore)}
    expected = {k: v for k, v in net.state_dict().items() if not k.startswith(ignore)}
    for key in [*expected, *state]:
        found, wanted = (list(of[key].shape) if key in of else "nothing" for of in (state, expected))
        if found != wanted and not key.endswith("num_batches_tracked"):  # a counter that old files lack
            raise ValueError(f"{file}: {key} is {found}, expected {wanted}")
    net.load_state_dict(state, strict=False)


def enlarge(x, size, factor, centred):
    """Bilinear enlargement by a whole factor that leaves everything where the backbone's pixels look.

    Args:
        x: (B, C, h, w).
        size: (H, W) of the result, h = ceil(H / factor) and w likewise.
        centred: as `Backbone.centred`. False puts pixel k of x on pixel k * factor of the result and holds the last
            ones beyond; aligning the edges instead would move C5's content by 14 image pixels on its way to P1.
    """
    if not centred:
        x = F.pad(x, (0, 1, 0, 1), mode="replicate")
    whole = [n * factor if centred else (n - 1) * factor + 1 for n in x.shape[-2:]]
    return F.interpolate(x, size=whole, mode="bilinear", align_corners=not centred)[:, :, : size[0], : size[1]]


class FPN(nn.Module):
    """Feature pyramid (Lin et al. 2017): 1x1 laterals on C2..C5, top-down bilinear sums, 3x3 smoothing of P1..P3.

    `centred`: as `Backbone.centred`.
    """

    def __init__(self, in_channels, channels=256, centred=False):
        super().__init__()
        self.centred = centred
        self.laterals = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in SCALES)
        for conv in (*self.laterals, *self.smooth):
            nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="linear")  # unit scale in, unit scale out
            nn.init.zeros_(conv.bias)

    def forward(self, features, scales=(0, 1, 2), lazily=False):
        """C2..C5 -> [P1, P2, P3], each (B, channels, H, W); scales that are not asked for are None, uncomputed.

        `lazily`: as `LazyMap`s, computed where they are read.
        """
        pyramid = [None] * len(SCALES)
        top = self.laterals[3](features[3])
        finest = min(scales)
        for i in range(2, finest - 1, -1):  # P3 = C4 + C5, P2 = C3 + P3, P1 = C2 + P2, each before smoothing
            if lazily and i == finest:  # no other map needs the whole of it
                shape = (*top.shape[:2], *features[i].shape[2:])
                pyramid[i] = LazyMap(self.smooth[i], shape, lambda first, last: self.add_lateral_rows(i, features[i], top, first, last))
                break
            top = self.add_lateral(i, features[i], top)
            if i in scales:
                pyramid[i] = LazyMap(self.smooth[i], top.shape, lambda first, last, x=top: x[:, :, first:last]) if lazily else self.smooth[i](top)
        return pyramid

    def add_lateral(self, i, feature, above, skip=0):
        """C2, C3 or C4 (i = 0, 1, 2) and the next coarser map -> the map before smoothing.

        `skip`: rows of the enlarged map above the feature's first.
        """
        x = self.laterals[i](feature)
        x += enlarge(above, (skip + x.shape[2], x.shape[3]), 2, self.centred)[:, :, skip:]
        return x

    def add_lateral_rows(self, i, feature, above, first, last):
        """Rows first to last of what `add_lateral` gives."""
        coarse, end = max(0, first // 2 - 1), (last - 1) // 2 + 2  # the rows that enlarging reads
        return self.add_lateral(i, feature[:, :, first:last], above[:, :, coarse:end], skip=first - 2 * coarse)


class LazyMap:
    """A pyramid's map, of which only the rows that are read are computed: Tab. A.11's head needs 3/8 of P1, and the whole
    of P1 costs half a ResNet50. The host must know which rows; a GPU would have to wait for it.

    Args:
        smooth: the 3x3 convolution.
        shape: (B, C, H, W), the whole map's.
        before: a function (first, last) -> those rows of the map before smoothing.
    """

    def __init__(self, smooth, shape, before):
        self.smooth, self.shape, self.before, self.device = smooth, shape, before, smooth.weight.device
        self.top = self.bottom = 0  # the rows computed, half-open
        self.x, self.first = None, 0  # a block that holds them, and the row of the map that is its first

    def rows(self, top, bottom, margin=0):
        """Computes rows top to bottom, half-open, where they are not: a block (B, C, h, W) with them, and its first row.

        The block may hold more rows; of those, only such as were asked for before are right. `margin`: how many rows
        more to compute on each side, if any have to be.
        """
        top, bottom = max(0, top), min(self.shape[2], bottom)
        if self.x is not None and self.top <= top and bottom <= self.bottom:
            return self.x, self.first
        top, bottom = max(0, top - margin), min(self.shape[2], bottom + margin)
        if self.x is None:
            self.top, self.bottom = top, bottom
            self.x, self.first = self._compute(top, bottom)
        else:
            parts = [(self.x, self.first, self.top, self.bottom)]
            if top < self.top:
                parts.insert(0, (*self._compute(top, self.top), top, self.top))
            if bottom > self.bottom:
                parts.append((*self._compute(self.bottom, bottom), self.bottom, bottom))
            self.x = torch.cat([x[:, :, low - first : high - first] for x, first, low, high in parts], 2)
            self.top, self.bottom = min(top, self.top), max(bottom, self.bottom)
            self.first = self.top
        return self.x, self.first

    def _compute(self, top, bottom):
        first, last = max(0, top - 1), min(self.shape[2], bottom + 1)  # with the neighbours that the 3x3 kernel reads
        return self.smooth(self.before(first, last)), first


# ---- mean accuracy (Sec. 4.1, Eq. 14) ----


def label_counts(logits, labels):
    """TP, P, TN, N of Eq. 14 per attribute, at threshold 0.5 on the probability (0 on the logit).

    Args:
        logits: (..., B, L); any leading dimensions, such as scales, are kept.
        labels: (B, L) of 0 and 1.
    Returns:
        (4, ..., L) float64 counts, which add up over batches.
    """
    predicted, positive = (logits > 0).float(), (labels > 0.5).float()  # float sums are the fastest, and exact to 2^24 samples
    true_positives, predictions, positives = (predicted * positive).sum(-2), predicted.sum(-2), positive.sum(-2)
    negatives = len(labels) - positives
    true_negatives = negatives - (predictions - true_positives)
    return torch.stack(torch.broadcast_tensors(true_positives, positives, true_negatives, negatives)).double()


def mean_accuracy(counts):
    """Label mA per attribute, (TP/P + TN/N) / 2 of Eq. 14, from the counts of `label_counts`: (4, ...) -> (...).

    NaN where an attribute has no positive or no negative; Eq. 14's mean over attributes is `.nanmean()`.
    """
    true_positives, positives, true_negatives, negatives = counts
    return (true_positives / positives + true_negatives / negatives) / 2


# ---- adaptive feature scale selection (Sec. 3.2.2, Eq. 4) ----


class AFSS(nn.Module):
    """Chooses the scale, P1, P2 or P3, from which each attribute is predicted: the one with the highest mA (Eq. 4).

    `update` adds up a training epoch's counts at every scale, `select` ends the epoch. The choice and the counts
    are buffers: they travel in the state dict.

    Args:
        attribute_groups: the group's name of each of the L attributes.
        mode: "group" (AFSS: one choice per group, by the mean mA of its attributes), "attribute" (AFSS* of Tab. 1),
            or "P1", "P2", "P3": that scale for all, never changed.
    """

    def __init__(self, attribute_groups, mode="group"):
        super().__init__()
        if mode not in ("group", "attribute", *SCALES):
            raise ValueError(f"AFSS mode {mode!r}: expected group, attribute, {', '.join(SCALES)}")
        self.attribute_groups = list(attribute_groups)
        self.live = mode in ("group", "attribute")  # still comparing; set to False to freeze the choice
        self.mode = mode
        start = 1 if self.live else SCALES.index(mode)
        self.register_buffer("selection", torch.full((len(self.attribute_groups),), start))  # (L,)
        self.register_buffer("counts", torch.zeros(4, len(SCALES), len(self.attribute_groups), dtype=torch.float64))
        self._read = None

    def scales(self):
        """The chosen scale of each attribute as a list of ints, read from the device only after a change."""
        if self.selection.is_inference():  # made in torch.inference_mode(): its changes cannot be told
            return self.selection.tolist()
        if self._read is None or self._read[:2] != (id(self.selection), self.selection._version):
            self._read = (id(self.selection), self.selection._version, self.selection.tolist())
        return self._read[2]

    @torch.no_grad()
    def update(self, logits, labels):
        """Adds a batch: logits (S, B, L), labels (B, L)."""
        self.counts += label_counts(logits, labels)

    @torch.no_grad()
    def select(self):
        """Eq. 4: takes the best scale of each group (or attribute), clears the counts.

        Returns:
            (S, L) label mA of the epoch at each scale; NaN for attributes without both labels. A group that has
            no defined mA keeps its scale.
        """
        accuracy = mean_accuracy(self.counts)  # (S, L)
        for unit in self._units():
            score = accuracy[:, unit].nanmean(1)  # (S,)
            if not score.isnan().any():
                self.selection[unit] = score.argmax()
        self.counts.zero_()
        return accuracy

    def _units(self):
        """The lists of attributes that share one choice."""
        if self.mode == "attribute":
            return [[j] for j in range(len(self.attribute_groups))]
        members = [[j for j, name in enumerate(self.attribute_groups) if name == group] for group in GROUPS]
        return [unit for unit in members if unit]


# ---- prior location extraction (Sec. 3.2.3, Eq. 5-9) ----


def prior_region(group, height):
    """Tab. A.11: the half-open rows (top, bottom) of a group's region on a map of this height, at least one row."""
    top, bottom = (round(share * height) for share in PRIOR_REGIONS[group])
    return min(top, height - 1), max(bottom, top + 1)


def image_to_map(points, stride, centred=False):
    """(..., 2) points from image pixels to pixels of a map of that stride; `centred` as `Backbone.centred`."""
    return (points + 0.5) / stride - 0.5 if centred else points / stride


def bilinear_sample(x, points, weights=None):
    """x at fractional points, zero outside the map; with weights, their weighted sum over m: sum_m W_m x(P_m).

    Args:
        x: (B, C, H, W), or a `LazyMap`.
        points: (B, N, M, 2), (x, y) in pixels of x.
        weights: (B, N, M); by default each point counts 1.
    Returns:
        (B, N, C)
    """
    B, C, H, W = x.shape
    corner = points.detach().floor()  # (B, N, M, 2), the pixel above and to the left of each point
    left, top = corner.unbind(-1)  # (B, N, M)
    first = 0  # row of the map that is x's first
    if isinstance(x, LazyMap):
        lowest, highest = (int(v) for v in top.clamp(-1, H - 1).aminmax())
        x, first = x.rows(lowest, highest + 2, margin=1)  # for the offset points to come
    fx, fy = (points - corner).unbind(-1)  # (B, N, M)
    rows, shares = [], []
    for row, share_y in ((top, 1 - fy), (top + 1, fy)):
        for column, share_x in ((left, 1 - fx), (left + 1, fx)):
            inside = (column >= 0) & (column < W) & (row >= 0) & (row < H)
            share = torch.where(inside, share_x * share_y, 0)
            rows.append(torch.where(inside, (row - first) * W + column, 0).long())
            shares.append(share if weights is None else weights * share)
    rows = torch.stack(rows, -1) + x.shape[2] * W * torch.arange(B, device=x.device).view(B, 1, 1, 1)  # (B, N, M, 4)
    shares = torch.stack(shares, -1).to(x.dtype)
    # A bag is one point's 4 M pixels: it reads whole pixels (rows of C numbers) and keeps no (B, N, M, C) in memory.
    pixels = x.permute(0, 2, 3, 1).reshape(-1, C)
    bags = F.embedding_bag(rows.flatten(2).flatten(0, 1), pixels, mode="sum",
                           per_sample_weights=shares.flatten(2).flatten(0, 1))
    return bags.unflatten(0, points.shape[:2])


class OffsetSampling(nn.Module):
    """Eq. 6 and 8: Phi(x, P_n) = A . sum_m W_m x(P_n + dP_m), one module for all groups and scales.

    The feature x(P_n) predicts M offsets dP_m, in pixels of the map, and M weights W_m that sum to 1; A is a
    learnable C x C projection. `offset_length`, a running mean of |dP_m| in training, shows a runaway.
    """

    def __init__(self, channels=256, M=3):
        super().__init__()
        self.M = M
        self.offsets = nn.Linear(channels, 2 * M)
        self.offset_weights = nn.Linear(channels, M)
        self.A = nn.Linear(channels, channels, bias=False)
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.offset_weights.weight)
        nn.init.zeros_(self.offset_weights.bias)
        nn.init.eye_(self.A.weight)
        # Equal offsets would get equal gradients and stay equal for ever, M points doing the work of one: start them
        # half a pixel away, evenly around the prior point, which remains their mean.
        angle = 2 * math.pi * torch.arange(M) / M
        with torch.no_grad():
            self.offsets.bias.copy_(torch.stack([angle.cos(), angle.sin()], 1).flatten() * (0.5 if M > 1 else 0))
        self.register_buffer("offset_length", torch.zeros(()))

    def forward(self, x, points):
        """x (B, C, H, W), points (B, N, 2) in pixels of x -> (B, N, C)."""
        reference = bilinear_sample(x, points[:, :, None])  # (B, N, C)
        layers = self.offsets, self.offset_weights  # two thin layers read the features in one go
        predicted = F.linear(reference, torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers]))
        offsets = predicted[..., : 2 * self.M].unflatten(-1, (self.M, 2))  # (B, N, M, 2)
        weights = predicted[..., 2 * self.M :].softmax(-1)  # (B, N, M)
        if self.training:
            self.offset_length.lerp_(offsets.detach().norm(dim=-1).mean().to(self.offset_length), 0.01)
        places = points[:, :, None] + offsets
        H, W = x.shape[2:]
        if points.shape[1] < H * W:
            return self.A(bilinear_sample(x, places, weights))
        # With more points than pixels, when all groups read one map, it is cheaper to project the pixels: A is linear.
        x = x.rows(0, H)[0] if isinstance(x, LazyMap) else x
        return bilinear_sample(self.A(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), places, weights)


class PointSampling(nn.Module):
    """Tab. 2 without offsets: x(P_n), the features at the prior points themselves."""

    def forward(self, x, points):
        """x (B, C, H, W), points (B, N, 2) in pixels of x -> (B, N, C)."""
        return bilinear_sample(x, points[:, :, None])


class PLE_R(nn.Module):
    """Region prior, Eq. 5: the rows of the group's region. No parameters; prior=False keeps the whole map."""

    def __init__(self, prior=True):
        super().__init__()
        self.prior = prior

    def forward(self, x, group, keypoints=None):
        """x (B, C, H, W) or a `LazyMap` -> (B, C, h, W)."""
        return self.several(x, [group])[0]

    def several(self, x, groups, keypoints=None):
        """The features of several groups, in a list."""
        regions, first = [prior_region(group if self.prior else "all", x.shape[2]) for group in groups], 0
        if isinstance(x, LazyMap):
            x, first = x.rows(min(top for top, _ in regions), max(bottom for _, bottom in regions))
        return [x[:, :, top - first : bottom - first] for top, bottom in regions]


class PLE_K(nn.Module):
    """Keypoint prior, Eq. 6-7: offset points around the group's MPII keypoints (Tab. A.12).

    prior=False takes all 16 keypoints for every group; offsets=False the features at the keypoints themselves.
    """

    def __init__(self, channels=256, M=3, offsets=True, prior=True):
        super().__init__()
        self.prior = prior
        self.sample = OffsetSampling(channels, M) if offsets else PointSampling()
        for name, indices in KEYPOINT_GROUPS.items():  # buffers, which lie where the keypoints do
            self.register_buffer(name, torch.tensor(indices), persistent=False)

    def forward(self, x, group, keypoints):
        """x (B, C, H, W), keypoints (B, 16, 2) in pixels of x -> (B, C, n), the group's n keypoints in index order."""
        return self.several(x, [group], keypoints)[0]

    def several(self, x, groups, keypoints):
        """The features of several groups, in a list; all points are sampled at once."""
        points = [keypoints.index_select(1, getattr(self, group if self.prior else "all")) for group in groups]
        features = self.sample(x, torch.cat(points, 1)).split([p.shape[1] for p in points], 1)
        return [f.transpose(1, 2) for f in features]


class PLE_S(nn.Module):
    """Sparse point prior, Eq. 8-9: offset points around a uniform grid over the group's region.

    Args:
        ratio: share of the region's points that is sampled (Fig. 6).
        offsets, prior: Tab. 2's switches; without prior the grid covers the whole map.
    """

    def __init__(self, channels=256, M=3, ratio=0.75, offsets=True, prior=True):
        super().__init__()
        self.ratio, self.prior = ratio, prior
        self.sample = OffsetSampling(channels, M) if offsets else PointSampling()

    def points(self, group, height, width, device=None):
        """The grid on a map of this size: (rows, columns, 2), evenly spaced, symmetric within the region."""
        top, bottom = prior_region(group if self.prior else "all", height)
        rows, columns = (max(1, round(n * math.sqrt(self.ratio))) for n in (bottom - top, width))
        y = top + (torch.arange(rows, device=device) + 0.5) * (bottom - top) / rows - 0.5
        x = (torch.arange(columns, device=device) + 0.5) * width / columns - 0.5
        return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)

    def forward(self, x, group, keypoints=None):
        """x (B, C, H, W) -> (B, C, rows, columns)."""
        return self.several(x, [group])[0]

    def several(self, x, groups, keypoints=None):
        """The features of several groups, in a list; all points are sampled at once."""
        grids = [self.points(group, *x.shape[2:], x.device) for group in groups]
        points = torch.cat([grid.flatten(0, 1) for grid in grids]).expand(x.shape[0], -1, 2)  # (B, N, 2)
        features = self.sample(x, points).split([grid.shape[:2].numel() for grid in grids], 1)
        return [f.transpose(1, 2).unflatten(2, grid.shape[:2]) for f, grid in zip(features, grids)]


def pyramid_pool(x):
    """Psi_agr of Eq. 5, 7, 9: max pooling on a pyramid of cells, 5 features per channel.

    (B, C, h, w) by 1x1 and 2x2 cells, (B, C, n) by 1 and 4 runs of points -> (B, 5 C).
    """
    pool, n = (F.adaptive_max_pool2d, 2) if x.dim() == 4 else (F.adaptive_max_pool1d, 4)
    cells = pool(x, n)
    return torch.cat([pool(cells, 1).flatten(1), cells.flatten(1)], 1)  # the small cells cover all: so does their maximum


# ---- the models (Eq. 1) ----


class SSPNet(nn.Module):
    """Backbone -> FPN -> AFSS -> PLE -> pyramid pooling -> one FC per group (Fig. 2, Eq. 1).

    Args:
        attribute_groups: for each of the L attributes, in the dataset's order, one of `GROUPS`.
        ple: "R", "K" or "S".
        backbone, weights: see `Backbone`.
        afss: see `AFSS`; "P1", "P2" or "P3" is "without AFSS" in Tab. 2.
        M, ratio: offset points per prior point (Fig. 5), share of points sampled by PLE-S (Fig. 6).
        offsets, prior: the switches of Tab. 2.
    """

    strides = STRIDES  # of what `features` returns

    def __init__(self, attribute_groups, ple="S", backbone="resnet50", weights=None, afss="group", M=3, ratio=0.75,
                 offsets=True, prior=True, channels=256):
        super().__init__()
        for j, group in enumerate(attribute_groups):
            if group not in GROUPS:
                raise ValueError(f"attribute {j} has group {group!r}: expected one of {', '.join(GROUPS)}")
        self.backbone = Backbone(backbone, weights)
        self.fpn = FPN(self.backbone.out_channels, channels, self.backbone.centred)
        self.afss = AFSS(attribute_groups, afss)
        if ple == "R":
            self.ple = PLE_R(prior)
        elif ple == "K":
            self.ple = PLE_K(channels, M, offsets, prior)
        elif ple == "S":
            self.ple = PLE_S(channels, M, ratio, offsets, prior)
        else:
            raise ValueError(f"ple {ple!r}: expected R, K or S")
        self.members = {g: [j for j, name in enumerate(attribute_groups) if name == g] for g in GROUPS}
        self.heads = nn.ModuleDict({g: nn.Linear(5 * channels, len(m)) for g, m in self.members.items() if m})
        by_group = [j for members in self.members.values() for j in members]
        self.register_buffer("order", torch.tensor(by_group).argsort(), persistent=False)  # back to the dataset's
        for head in self.heads.values():
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def features(self, images, scales=None, lazily=False):
        """(B, 3, H, W) -> [P1, P2, P3]; None for a scale that no attribute uses (or that is not in `scales`)."""
        return self.fpn(self.backbone(images), set(self.afss.scales()) if scales is None else scales, lazily)

    def group_logits(self, maps, keypoints=None, selection=None, apart=False):
        """The logits of each group's attributes from the pyramid: a list of (B, n), in the order of `heads`.

        Args:
            maps: [P1, P2, P3] of `features`.
            keypoints: (B, 16, 2) in image pixels, for PLE-K.
            selection: scale index per attribute; AFSS's by default.
            apart: read the maps for each group on its own, so that its gradient does not pass the others' points.
        """
        selection = self.afss.scales() if selection is None else selection
        chosen = {group: [selection[j] for j in self.members[group]] for group in self.heads}
        features = {}
        for scale in sorted(set(selection)):
            points = None if keypoints is None else image_to_map(keypoints, STRIDES[scale], self.backbone.centred)
            groups = [group for group in self.heads if scale in chosen[group]]
            for some in [[group] for group in groups] if apart else [groups]:
                features.update({(group, scale): f for group, f in zip(some, self.ple.several(maps[scale], some, points))})
        logits = []
        for group, head in self.heads.items():
            at = {scale: head(pyramid_pool(features[group, scale])) for scale in sorted(set(chosen[group]))}  # (B, attributes of the group)
            if len(at) == 1:
                logits += at.values()
            else:  # AFSS*: the group's attributes are on several scales
                logits.append(torch.stack([at[scale][:, i] for i, scale in enumerate(chosen[group])], 1))
        return logits

    def classify(self, maps, keypoints=None, selection=None):
        """The logits (B, L) in the dataset's order; arguments as for `group_logits`."""
        return torch.cat(self.group_logits(maps, keypoints, selection), 1).index_select(1, self.order)

    def attribute_logits(self, maps, keypoints=None):
        """L logits (B,), each of which depends on its own group's part of the maps alone: cheap to differentiate."""
        logits = [column for group in self.group_logits(maps, keypoints, apart=True) for column in group.unbind(1)]
        return [logits[j] for j in self.order.tolist()]

    def forward(self, images, keypoints=None):
        """Images (B, 3, H, W), and keypoints (B, 16, 2) in image pixels for PLE-K.

        Returns:
            In training (S, B, L): the logits from each of the scales that AFSS compares, or from the chosen one
            alone (S = 1) once it is frozen or fixed. In evaluation (B, L) from the chosen scales.
        """
        if isinstance(self.ple, PLE_K) and keypoints is None:
            raise ValueError("PLE-K needs keypoints (B, 16, 2): none were given")
        if not (self.training and self.afss.live):
            logits = self.classify(self.features(images, lazily=not images.is_cuda), keypoints)
            return logits[None] if self.training else logits
        maps = self.features(images, scales=range(len(SCALES)))
        L = len(self.afss.attribute_groups)
        return torch.stack([self.classify(maps, keypoints, [s] * L) for s in range(len(SCALES))])

    def map_of(self, attribute):
        """Which entry of `features` an attribute is predicted from (the A of Eq. 13)."""
        return self.afss.scales()[attribute]


class Baseline(nn.Module):
    """Strong Baseline (Jia et al. 2021): global average pooling of C5 and one linear layer; row 1 of Tab. 2 and 3."""

    strides = (32,)

    def __init__(self, attribute_groups, backbone="resnet50", weights=None):
        super().__init__()
        self.backbone = Backbone(backbone, weights, taps=("C5",))
        self.head = nn.Linear(self.backbone.out_channels[0], len(attribute_groups))

    def features(self, images):
        """(B, 3, H, W) -> [C5]."""
        return self.backbone(images)

    def classify(self, maps, keypoints=None):
        """[C5] -> logits (B, L)."""
        return self.head(maps[0].mean((2, 3)))

    def attribute_logits(self, maps, keypoints=None):
        """L logits (B,), to be differentiated one by one."""
        return list(self.classify(maps).unbind(1))

    def forward(self, images, keypoints=None):
        """(B, 3, H, W) -> logits, (1, B, L) in training and (B, L) in evaluation, as `SSPNet` does."""
        logits = self.classify(self.features(images))
        return logits[None] if self.training else logits

    def map_of(self, attribute):
        """Which entry of `features` an attribute is predicted from."""
        return 0


# ---- hierarchical loss (Sec. 3.2.4, Eq. 10-12) ----


def imbalance_weights(labels, positive_ratio):
    """Eq. 11: exp(1 - r_j) where the label is 1, exp(r_j) where it is 0. labels (B, L), positive_ratio (L,) -> (B, L)."""
    return torch.where(labels > 0.5, (1 - positive_ratio).exp(), positive_ratio.exp())


def weighted_bce(logits, labels, positive_ratio):
    """Eq. 10: weighted binary cross-entropy, summed over attributes, averaged over samples.

    Args:
        logits: (..., B, L); averaged over leading dimensions, such as AFSS's scales, too.
        labels: (B, L) of 0 and 1, float.
        positive_ratio: (L,) r_j, the share of positives of each attribute in the training set.
    """
    weights = imbalance_weights(labels, positive_ratio).expand_as(logits)
    bce = F.binary_cross_entropy_with_logits(logits, labels.expand_as(logits), weights, reduction="none")
    return bce.sum(-1).mean()


class HierarchicalLoss(nn.Module):
    """Eq. 12: the sum over the groups of Eq. 10 on the group's attributes.

    Args:
        attribute_groups: the group's name of each of the L attributes.
        positive_ratio: (L,) r_j of Eq. 11.
    """

    def __init__(self, attribute_groups, positive_ratio):
        super().__init__()
        self.register_buffer("positive_ratio", positive_ratio)
        for group in GROUPS:
            members = [j for j, name in enumerate(attribute_groups) if name == group]
            self.register_buffer(group, torch.tensor(members, dtype=torch.long))

    def forward(self, logits, labels):
        """logits (..., B, L), labels (B, L) -> a scalar; scales in leading dimensions count alike."""
        groups = [getattr(self, group) for group in GROUPS]
        return sum(weighted_bce(logits.index_select(-1, m), labels.index_select(-1, m), self.positive_ratio[m])
                   for m in groups if len(m))
