"""SSPNet: scale and spatial priors guided pedestrian attribute recognition.

In the order of the paper's Section 3, with its names; needs only torch and torchvision.

    Backbone, FPN          feature maps P1, P2, P3 at strides 4, 8, 16       Sec. 3.2.1, 3.2.2
    AFSS                   adaptive feature scale selection                  Eq. 4 (Eq. 14 for mA)
    PLE_R, PLE_K, PLE_S    prior location extraction                         Eq. 5-9
    pyramid_pool           feature aggregation Psi_agr                       Eq. 5, 7, 9
    SSPNet, Baseline       the whole model                                   Eq. 1
    HierarchicalLoss       weighted binary cross-entropy per group           Eq. 10-12

Shapes: B images, C channels, H x W map size, N prior points, M offset points, L attributes and
S = 3 scales. Points are (x, y) in pixels; pixel centres have integer coordinates.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model

GROUPS = ("head", "torso", "bottom", "all")
SCALES = ("P1", "P2", "P3")

# Tab. A.11: top and bottom of each group's region as fractions of the map's height.
PRIOR_REGIONS = {"head": (0, 3 / 8), "torso": (1 / 8, 5 / 8), "bottom": (1 / 2, 1), "all": (0, 1)}

# Tab. A.12: each group's keypoints, in MPII order:
# 0 r-ankle  1 r-knee  2 r-hip  3 l-hip  4 l-knee  5 l-ankle  6 pelvis  7 thorax  8 upper neck
# 9 head top  10 r-wrist  11 r-elbow  12 r-shoulder  13 l-shoulder  14 l-elbow  15 l-wrist
KEYPOINT_GROUPS = {
    "head": [7, 8, 9, 12, 13],
    "torso": [2, 3, 6, 10, 11, 12, 13, 14, 15],
    "bottom": [0, 1, 2, 3, 4, 5, 6],
    "all": list(range(16)),
}


# ---- Feature pyramid (Sec. 3.2.1 and 3.2.2)


class Backbone(nn.Module):
    """A torchvision ResNet or Swin Transformer that returns C2..C5, the maps at strides 4 to 32.

    weights: None (random), "imagenet" (torchvision downloads them) or a state dict file.
    first: the finest map to return, 2 for the pyramid, 5 (C5 alone) for the baseline.
    A backbone of your own needs `out_channels` and may set `patches`, as `upsample` means it.
    """

    names = ("resnet18", "resnet34", "resnet50", "resnet101", "swin_t", "swin_s", "swin_b")

    def __init__(self, name="resnet50", weights=None, first=2):
        super().__init__()
        if name not in self.names:
            raise ValueError(f"backbone {name!r}: expected one of {', '.join(self.names)}")
        net = get_model(name, weights="IMAGENET1K_V1" if weights == "imagenet" else None)
        if weights not in (None, "imagenet"):
            load_weights(net, weights, classifier=("fc.", "head."))

        self.patches = name.startswith("swin")
        width = net.head.in_features if self.patches else net.fc.in_features
        self.out_channels = [width // 8, width // 4, width // 2, width][first - 2 :]
        if self.patches:
            stages = [net.features[i : i + 2] for i in (0, 2, 4, 6)]  # (merge patches, blocks)
            # Swin normalizes its last map only; the others get a new LayerNorm.
            self.norms = nn.ModuleList([*map(nn.LayerNorm, self.out_channels[:-1]), net.norm])
        else:
            stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
            stages = [nn.Sequential(stem, net.layer1), net.layer2, net.layer3, net.layer4]
        self.stages = nn.ModuleList(stages)

    def forward(self, images):
        """(B, 3, H, W) -> [C2, C3, C4, C5], each (B, C, H / stride, W / stride)."""
        maps, x = [], images
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        maps = maps[-len(self.out_channels) :]
        if self.patches:  # Swin's maps are (B, H, W, C)
            maps = [norm(x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, maps, strict=True)]
        return maps


def load_weights(net, file, classifier=()):
    """Loads a state dict file; what starts with `classifier` may be missing or more."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        state = {name: t for name, t in state.items() if not name.startswith(classifier)}
        missing, unexpected = net.load_state_dict(state, strict=False)
    except Exception as error:  # the zip reader and the restricted unpickler raise many kinds
        raise ValueError(f"{file}: not this network's state dict ({str(error)[:200]})") from error
    for name in (*missing, *unexpected):
        if not name.startswith(classifier) and not name.endswith("num_batches_tracked"):
            raise ValueError(f"{file}: {name} is missing or unexpected")


def upsample(x, size, factor, patches):
    """Bilinear upsampling that keeps every map pixel above the image pixels it was computed from.

    Where `patches`, map pixel k covers image pixels k s .. k s + s - 1 (stride s): align the edges.
    Otherwise it is centred on image pixel k s (ResNet's padded strided convolutions) and moves to
    pixel k * factor. With edges aligned, C5's content would move 14 pixels on its way to P1.

    x (B, C, h, w) -> (B, C, *size). Beyond the last map pixel, its value is held.
    """
    x = torch.cat([x, x[:, :, -1:]], 2)
    x = torch.cat([x, x[:, :, :, -1:]], 3)
    h, w = x.shape[-2:]
    whole = (h * factor, w * factor) if patches else ((h - 1) * factor + 1, (w - 1) * factor + 1)
    x = F.interpolate(x, size=whole, mode="bilinear", align_corners=not patches)
    return x[:, :, : size[0], : size[1]]


def image_to_map(points, stride, patches):
    """(..., 2) points from image pixels to map pixels; the counterpart of `upsample`."""
    return (points + 0.5) / stride - 0.5 if patches else points / stride


class FPN(nn.Module):
    """Feature pyramid (Lin et al. 2017): 1x1 laterals, top-down bilinear sums, 3x3 smoothing."""

    def __init__(self, in_channels, channels=256, patches=False):
        super().__init__()
        self.patches = patches
        self.laterals = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        for conv in (*self.laterals, *self.smooth):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")  # unit scale in and out
            nn.init.zeros_(conv.bias)

    def forward(self, features, scales=(0, 1, 2)):
        """[C2, C3, C4, C5] -> [P1, P2, P3], each (B, channels, H, W); None if not in `scales`."""
        pyramid = [None, None, None]
        top = self.laterals[3](features[3])
        for s in range(2, min(scales) - 1, -1):
            lateral = self.laterals[s](features[s])
            top = lateral.add_(upsample(top, lateral.shape[-2:], 2, self.patches))
            if s in scales:
                pyramid[s] = self.smooth[s](top)
        return pyramid


# ---- Adaptive feature scale selection (Sec. 3.2.2, Eq. 4) and mean accuracy (Sec. 4.1, Eq. 14)


def label_counts(logits, labels):
    """TP, P, TN, N of Eq. 14 per attribute: logits (..., B, L), labels (B, L) -> (4, ..., L)."""
    predicted = (logits > 0).float()  # a logit of 0 is a probability of 0.5
    positive = (labels > 0.5).float()  # sums of floats are exact to 2^24 images
    TP, P = (predicted * positive).sum(-2), positive.sum(-2)
    TN, N = ((1 - predicted) * (1 - positive)).sum(-2), (1 - positive).sum(-2)
    return torch.stack(torch.broadcast_tensors(TP, P, TN, N)).double()


def mean_accuracy(counts):
    """Eq. 14 before its mean over attributes, (TP / P + TN / N) / 2: (4, ..., L) -> (..., L).

    NaN for attributes without positives or without negatives; `.nanmean(-1)` gives mA.
    """
    TP, P, TN, N = counts
    return (TP / P + TN / N) / 2


class AFSS(nn.Module):
    """Eq. 4: picks, for each group of attributes, the scale on which mA is highest.

    `update` counts every training batch on all scales; `select` picks at the end of an epoch; both
    do nothing once the choice is frozen (`selecting = False`) or where it is fixed. The choice for
    attribute j is `scales[j]`, 0, 1 or 2. mode: "group", "attribute" (one choice for each, AFSS* of
    Tab. 1), or "P1", "P2" or "P3" (fixed).
    """

    def __init__(self, attribute_groups, mode="group"):
        super().__init__()
        if mode not in ("group", "attribute", "P1", "P2", "P3"):
            raise ValueError(f"AFSS mode {mode!r}: expected group, attribute, P1, P2 or P3")
        L = len(attribute_groups)
        self.selecting = mode in ("group", "attribute")
        self.scales = [1 if self.selecting else ("P1", "P2", "P3").index(mode)] * L
        self.units = list(attribute_groups) if mode == "group" else list(range(L))
        self.register_buffer("counts", torch.zeros(4, 3, L, dtype=torch.float64))

    def get_extra_state(self):  # the choice travels in the state dict
        return list(self.scales)

    def set_extra_state(self, scales):
        if len(scales) != len(self.scales) or not set(scales) <= {0, 1, 2}:
            raise ValueError(f"AFSS: expected {len(self.scales)} scales, each of them 0, 1 or 2")
        self.scales = list(scales)

    @torch.no_grad()
    def update(self, logits, labels):
        """Counts a batch: logits (S, B, L), labels (B, L)."""
        if self.selecting:
            self.counts += label_counts(logits, labels)

    def select(self):
        """Ends an epoch; returns its mA on each scale, (S, L). An undefined mA keeps the choice."""
        if not self.selecting:
            return None
        mA = mean_accuracy(self.counts).cpu()
        for unit in set(self.units):  # the attributes of one unit share a scale
            members = [j for j, u in enumerate(self.units) if u == unit]
            score = mA[:, members].nanmean(1)  # (S,)
            if not score.isnan().any():
                best = score.argmax().item()  # of equal scores the finest scale
                for j in members:
                    self.scales[j] = best
        self.counts.zero_()
        return mA


# ---- Prior location extraction (Sec. 3.2.3, Eq. 5-9)
# Each PLE takes a map and several groups, whose points it samples at once; one result per group.


def prior_region(group, height):
    """Tab. A.11: the rows [top, bottom) of a group's region on a map of this height."""
    top, bottom = PRIOR_REGIONS[group]
    top, bottom = round(top * height), round(bottom * height)
    return min(top, height - 1), max(bottom, top + 1)  # at least one row on tiny maps


def bilinear_sample(x, points, weights=None):
    """Bilinear sampling, zero outside the map: sum_m W_m x(P_m).

    x (B, C, H, W), points (B, N, M, 2) in pixels of x, weights (B, N, M) -> (B, N, C). Without
    weights: x at points (B, N, 2). Computed in float32 or better, returned in the dtype of x.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    points = points.to(dtype)
    if weights is None:
        points, weights = points.unsqueeze(2), torch.ones_like(points[:, :, :1])
    B, C, H, W = x.shape
    indices, shares = [], []
    for position, size in ((points[..., 0], W), (points[..., 1], H)):
        low = position.detach().floor()
        fraction = position - low
        neighbour = torch.stack([low, low + 1], -1)  # (B, N, M, 2), the pixels on both sides
        share = torch.stack([1 - fraction, fraction], -1)
        indices.append(neighbour.int().clamp(0, size - 1))
        shares.append(share * (neighbour == indices[-1]))  # 0 outside the map
    # Two rows times two columns are the four corners: (B, N, M, 2, 2). A bag is one point's 4 M.
    first = H * W * torch.arange(B, dtype=torch.int32, device=x.device).view(B, 1, 1, 1, 1)
    index = first + W * indices[1].unsqueeze(-1) + indices[0].unsqueeze(-2)
    share = weights[..., None, None] * shares[1].unsqueeze(-1) * shares[0].unsqueeze(-2)
    index, share = index.flatten(2).flatten(0, 1), share.flatten(2).flatten(0, 1)
    pixels = x.permute(0, 2, 3, 1).reshape(B * H * W, C).to(dtype)
    bags = F.embedding_bag(index, pixels, mode="sum", per_sample_weights=share.to(dtype))
    return bags.unflatten(0, points.shape[:2]).to(x.dtype)  # (B, N, M, C) was never in memory


class OffsetSampling(nn.Module):
    """Eq. 6 and 8: Phi(x, P_n) = A sum_m W_m x(P_n + dP_m), shared by all groups and scales.

    The feature x(P_n) predicts the M offsets dP_m in map pixels, and weights W_m that sum to 1.
    """

    def __init__(self, channels=256, M=3):
        super().__init__()
        self.M = M
        self.predict = nn.Linear(channels, 3 * M)  # M offsets (x, y), then M weights
        self.A = nn.Linear(channels, channels, bias=False)
        # Equal weights and half-pixel offsets around P_n; equal offsets would stay equal for ever.
        angle = 2 * torch.pi * torch.arange(M) / M
        radius = 0.5 if M > 1 else 0.0
        ring = radius * torch.stack([angle.cos(), angle.sin()], 1).flatten()
        nn.init.zeros_(self.predict.weight)
        self.predict.bias.data = torch.cat([ring, torch.zeros(M)])
        nn.init.eye_(self.A.weight)

    def forward(self, x, points):
        """x (B, C, H, W), points P_n (B, N, 2) in pixels of x -> (B, N, C)."""
        reference = bilinear_sample(x, points)  # (B, N, C)
        offsets, weights = self.predict(reference).split([2 * self.M, self.M], 2)
        places = points.unsqueeze(2) + offsets.unflatten(2, (self.M, 2))  # (B, N, M, 2)
        return self.A(bilinear_sample(x, places, weights.softmax(2)))


class PLE_R(nn.Module):
    """Region prior, Eq. 5: the rows of the group's region; without prior the whole map."""

    def __init__(self, prior=True):
        super().__init__()
        self.prior = prior

    def forward(self, x, groups, keypoints=None):
        """x (B, C, H, W) -> for each group (B, C, h, W)."""
        regions = [prior_region(group if self.prior else "all", x.shape[2]) for group in groups]
        return [x[:, :, top:bottom] for top, bottom in regions]


class PLE_K(nn.Module):
    """Keypoint prior, Eq. 6: offset sampling around the group's keypoints; without prior all 16."""

    def __init__(self, channels=256, M=3, offsets=True, prior=True):
        super().__init__()
        self.prior = prior
        self.sample = OffsetSampling(channels, M) if offsets else bilinear_sample

    def forward(self, x, groups, keypoints):
        """x (B, C, H, W), keypoints (B, 16, 2) in pixels of x -> for each group (B, C, n)."""
        if keypoints is None or keypoints.shape != (x.shape[0], 16, 2):
            raise ValueError("PLE-K: expected keypoints (B, 16, 2), in MPII's order")
        members = [KEYPOINT_GROUPS[group if self.prior else "all"] for group in groups]
        points = torch.stack([keypoints[:, n] for n in sum(members, [])], 1)
        features = self.sample(x, points).split([len(group) for group in members], 1)
        return [feature.transpose(1, 2) for feature in features]


class PLE_S(nn.Module):
    """Sparse prior, Eq. 8: offset sampling around a uniform grid over the group's region.

    `ratio` is the fraction of the region's pixels that become grid points (Fig. 6).
    """

    def __init__(self, channels=256, M=3, ratio=0.75, offsets=True, prior=True):
        super().__init__()
        self.ratio, self.prior = ratio, prior
        self.sample = OffsetSampling(channels, M) if offsets else bilinear_sample

    def points(self, group, height, width, device=None):
        """The grid on a map of this size, centred in the group's region: (rows, columns, 2)."""
        top, bottom = prior_region(group if self.prior else "all", height)
        rows = max(1, round((bottom - top) * self.ratio**0.5))
        columns = max(1, round(width * self.ratio**0.5))
        half_y, half_x = (bottom - top) / rows / 2, width / columns / 2  # half a step
        y = torch.linspace(top + half_y - 0.5, bottom - half_y - 0.5, rows, device=device)
        x = torch.linspace(half_x - 0.5, width - half_x - 0.5, columns, device=device)
        return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)

    def forward(self, x, groups, keypoints=None):
        """x (B, C, H, W) -> for each group (B, C, rows, columns)."""
        grids = [self.points(group, *x.shape[2:], x.device) for group in groups]
        points = torch.cat([grid.flatten(0, 1) for grid in grids]).expand(x.shape[0], -1, 2)
        features = self.sample(x, points).split([grid[..., 0].numel() for grid in grids], 1)
        pairs = zip(features, grids, strict=True)
        return [feature.transpose(1, 2).unflatten(2, grid.shape[:2]) for feature, grid in pairs]


def pyramid_pool(x):
    """Psi_agr of Eq. 5, 7 and 9: max pooling over the whole and over 4 parts.

    (B, C, h, w) in 1x1 and 2x2 cells, (B, C, n) in 1 and 4 runs of points -> (B, 5 C).
    """
    parts = F.adaptive_max_pool2d(x, 2).flatten(2) if x.dim() == 4 else F.adaptive_max_pool1d(x, 4)
    whole = F.adaptive_max_pool1d(parts, 1)  # the parts cover everything
    return torch.cat([whole.flatten(1), parts.flatten(1)], 1)


# ---- The model (Fig. 2, Eq. 1)


class SSPNet(nn.Module):
    """Backbone -> FPN -> AFSS -> PLE -> pyramid pooling -> one linear head per group.

    Args:
        attribute_groups: the group ("head", "torso", "bottom", "all") of each of the L attributes.
        ple: "R", "K" or "S"; offsets and prior are the switches of Tab. 2.
        backbone: one of `Backbone.names` with these weights, or a module that returns C2..C5.
        afss: see `AFSS`; "P1", "P2" or "P3" is "without AFSS" in Tab. 2.
        M, ratio: offset points per prior point (Fig. 5), fraction of points in PLE-S (Fig. 6).
        channels: C of P1, P2 and P3.
    """

    strides = (4, 8, 16)  # of P1, P2, P3: image pixels per map pixel

    def __init__(
        self,
        attribute_groups,
        ple="S",
        backbone="resnet50",
        weights=None,
        afss="group",
        M=3,
        ratio=0.75,
        offsets=True,
        prior=True,
        channels=256,
    ):
        super().__init__()
        for group in set(attribute_groups) - set(GROUPS):
            raise ValueError(f"group {group!r}: expected one of {', '.join(GROUPS)}")
        self.attribute_groups = list(attribute_groups)
        self.backbone = Backbone(backbone, weights) if isinstance(backbone, str) else backbone
        self.patches = getattr(self.backbone, "patches", False)
        self.fpn = FPN(self.backbone.out_channels, channels, self.patches)
        self.afss = AFSS(attribute_groups, afss)
        if ple == "R":
            self.ple = PLE_R(prior)
        elif ple == "K":
            self.ple = PLE_K(channels, M, offsets, prior)
        elif ple == "S":
            self.ple = PLE_S(channels, M, ratio, offsets, prior)
        else:
            raise ValueError(f"ple {ple!r}: expected R, K or S")
        self.members, self.heads = {}, nn.ModuleDict()
        for group in (g for g in GROUPS if g in attribute_groups):
            members = [j for j, g in enumerate(attribute_groups) if g == group]
            self.members[group] = members
            self.heads[group] = nn.Linear(5 * channels, len(members))
            nn.init.normal_(self.heads[group].weight, std=0.01)
            nn.init.zeros_(self.heads[group].bias)

    def features(self, images, scales=None):
        """(B, 3, H, W) -> [P1, P2, P3]; None for scales that no attribute uses."""
        return self.fpn(self.backbone(images), self.afss.scales if scales is None else scales)

    def attribute_logits(self, maps, keypoints=None, scales=None):
        """A list of L logits (B,): attribute j from maps[scales[j]], by default AFSS's choice."""
        scales = self.afss.scales if scales is None else scales
        logits = [None] * len(scales)
        for s in sorted(set(scales)):
            here = [j for j, scale in enumerate(scales) if scale == s]
            groups = sorted({self.attribute_groups[j] for j in here})
            scale = self.strides[s], self.patches
            points = None if keypoints is None else image_to_map(keypoints, *scale)
            for group, x in zip(groups, self.ple(maps[s], groups, points), strict=True):
                feature = pyramid_pool(x)  # F_g of Eq. 5, 7, 9
                group_logits = self.heads[group](feature).unbind(1)
                for j, logit in zip(self.members[group], group_logits, strict=True):
                    if j in here:  # with AFSS*, a group's attributes are on several scales
                        logits[j] = logit
        return logits

    def classify(self, maps, keypoints=None, scales=None):
        """The same as one tensor (B, L)."""
        return torch.stack(self.attribute_logits(maps, keypoints, scales), 1)

    def forward(self, images, keypoints=None):
        """Images (B, 3, H, W), for PLE-K keypoints (B, 16, 2) in image pixels -> logits (B, L).

        In training (3, B, L), from each scale for AFSS to compare, or (1, B, L) once it is frozen.
        """
        if self.training and self.afss.selecting:
            maps = self.features(images, scales=(0, 1, 2))
            L = len(self.attribute_groups)
            return torch.stack([self.classify(maps, keypoints, [s] * L) for s in range(3)])
        logits = self.classify(self.features(images), keypoints)
        return logits[None] if self.training else logits

    def map_of(self, attribute):
        """Which of the maps of `features` the attribute is predicted from: the A of Eq. 13."""
        return self.afss.scales[attribute]


class Baseline(nn.Module):
    """Strong Baseline (Jia et al. 2021): global average pooling of C5 and one linear layer."""

    strides = (32,)

    def __init__(self, attribute_groups, backbone="resnet50", weights=None):
        super().__init__()
        self.backbone = Backbone(backbone, weights, 5) if isinstance(backbone, str) else backbone
        self.patches = getattr(self.backbone, "patches", False)
        self.head = nn.Linear(self.backbone.out_channels[-1], len(attribute_groups))

    def features(self, images):
        """(B, 3, H, W) -> [C5]."""
        return self.backbone(images)[-1:]

    def attribute_logits(self, maps, keypoints=None):
        """[C5] -> a list of L logits (B,)."""
        return list(self.head(maps[0].mean((2, 3))).unbind(1))

    def forward(self, images, keypoints=None):
        """(B, 3, H, W) -> logits, (1, B, L) in training and (B, L) in evaluation, as `SSPNet`."""
        logits = torch.stack(self.attribute_logits(self.features(images)), 1)
        return logits[None] if self.training else logits

    def map_of(self, attribute):
        """Which of the maps of `features` the attribute is predicted from."""
        return 0


def build_model(config, weights=None):
    """The model of a training's settings, a dict; ple "none" is the baseline."""
    if config["ple"] == "none":
        return Baseline(config["groups"], config["backbone"], weights)
    names = ("ple", "backbone", "afss", "M", "ratio", "offsets", "prior", "channels")
    return SSPNet(config["groups"], weights=weights, **{name: config[name] for name in names})


# ---- Hierarchical loss (Sec. 3.2.4, Eq. 10-12)


def imbalance_weights(labels, positive_ratio):
    """Eq. 11: exp(1 - r_j) for positive, exp(r_j) for negative labels. (B, L), (L,) -> (B, L)."""
    return torch.where(labels > 0.5, (1 - positive_ratio).exp(), positive_ratio.exp())


def weighted_bce(logits, labels, positive_ratio):
    """Eq. 10: weighted cross-entropy, summed over attributes, averaged over images (and scales).

    logits (..., B, L), labels (B, L); positive_ratio (L,) is r_j, from the training set -> scalar.
    """
    labels = labels.to(logits.dtype).expand_as(logits)
    weights = imbalance_weights(labels, positive_ratio)
    bce = F.binary_cross_entropy_with_logits(logits, labels, weights, reduction="none")
    return bce.sum(-1).mean()


class HierarchicalLoss(nn.Module):
    """Eq. 12: the sum over the groups of Eq. 10 on the group's attributes."""

    def __init__(self, attribute_groups, positive_ratio):
        super().__init__()
        self.register_buffer("positive_ratio", positive_ratio)
        self.groups = sorted(set(attribute_groups))
        for group in self.groups:  # buffers lie on the device of the logits
            members = [j for j, g in enumerate(attribute_groups) if g == group]
            self.register_buffer(group, torch.tensor(members))

    def forward(self, logits, labels):
        """logits (..., B, L), labels (B, L) -> a scalar."""
        total = 0
        for group in self.groups:
            j = getattr(self, group)
            total = total + weighted_bce(logits[..., j], labels[..., j], self.positive_ratio[j])
        return total
