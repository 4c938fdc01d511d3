"""SSPNet: scale and spatial priors guided pedestrian attribute recognition.

This file follows Section 3 of the paper, in its order and with its names. It needs only torch and
torchvision.

    Backbone, FPN          feature maps P1, P2, P3 at strides 4, 8, 16       Sec. 3.2.1, 3.2.2
    AFSS                   adaptive feature scale selection                  Eq. 4 (Eq. 14 for mA)
    PLE_R, PLE_K, PLE_S    prior location extraction                         Eq. 5-9
    SimCC                  the keypoints that PLE_K reads                    Sec. 3.2.3, ref. 29
    pyramid_pool           feature aggregation Psi_agr                       Eq. 5, 7, 9
    SSPNet, Baseline       the whole model                                   Eq. 1
    HierarchicalLoss       weighted binary cross-entropy per group           Eq. 10-12
    response_maps          Grad-CAM-P, to_image over the photo               Eq. 2, 13
    heatmap_to_box         boxes, box_iou against true ones                  Eq. 3, Sec. 4.5

Eq. 1, a = f_A(F(Psi_b(X; theta_A); theta_S); theta_P): Psi_b is `backbone` and `fpn` with weights
theta_A, F is `afss` with its choice theta_S (`scales`), theta_P is the spatial prior `ple`, and f_A
is the `heads` after it.

Shapes: B images, C channels, H x W map, N prior points, M offset points, L attributes, S = 3 scales
(in Eq. 14, P and N count labels). Points are (x, y) in pixels, whose centres are at integers.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model

GROUPS = ("head", "torso", "bottom", "all")
SCALES = ("P1", "P2", "P3")


class InputError(ValueError):
    """Bad user input; the commands print it in one line."""


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
    """A torchvision network that returns C2..C5, its maps at strides 4 to 32.

    weights: None (random), "imagenet" (torchvision downloads them) or the path of a state dict.
    pyramid: False returns only C5, for the baseline. A backbone of your own needs `out_channels`
    and may set `patches`, see `upsample`."""

    swins = ("swin_t", "swin_s", "swin_b")
    names = ("resnet18", "resnet34", "resnet50", "resnet101", *swins, "mobilenet_v2")

    def __init__(self, name="resnet50", weights=None, pyramid=True):
        super().__init__()
        net = get_model(name, weights="IMAGENET1K_V1" if weights == "imagenet" else None)
        if weights not in (None, "imagenet"):
            load_weights(net, weights, classifier=("fc.", "head.", "classifier."))

        self.patches = name in self.swins
        if name == "mobilenet_v2":
            channels = [24, 32, 96, 1280]  # of C2 to C5
            stages = [net.features[a:b] for a, b in ((0, 4), (4, 7), (7, 14), (14, 19))]
        else:
            width = net.head.in_features if self.patches else net.fc.in_features
            channels = [width // 8, width // 4, width // 2, width]
            if self.patches:
                stages = [net.features[i : i + 2] for i in (0, 2, 4, 6)]  # (merge patches, blocks)
            else:
                stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
                stages = [nn.Sequential(stem, net.layer1), net.layer2, net.layer3, net.layer4]
        self.out_channels = channels if pyramid else channels[-1:]
        self.stages = nn.ModuleList(stages)
        if self.patches:
            # Swin normalizes only its last map; each other map gets a new, untrained LayerNorm.
            self.norms = nn.ModuleList([*map(nn.LayerNorm, self.out_channels[:-1]), net.norm])

    def forward(self, images):
        """(B, 3, H, W) -> [C2, C3, C4, C5], each (B, C, H / stride, W / stride)."""
        maps = []
        x = images
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        maps = maps[-len(self.out_channels) :]
        if self.patches:  # Swin's maps are (B, H, W, C)
            maps = [norm(x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, maps, strict=True)]
        return maps


def upsample(x, size, factor, patches):
    """Bilinear upsampling that keeps map and image in register: (B, C, h, w) -> (B, C, *size).

    Which image pixels does map pixel k look at, at stride s? With `patches` (Swin) it covers pixels
    s k to s k + s - 1, so map and image share their edges. Without them (ResNet's padded, strided
    convolutions) it is centred on pixel s k, so upsampling puts it at k * factor; with shared edges
    C5 would shift by 14 image pixels on its way to P1. Beyond the last map pixel, its value is
    repeated."""
    x = torch.cat([x, x[:, :, -1:]], 2)
    x = torch.cat([x, x[:, :, :, -1:]], 3)
    h, w = x.shape[-2:]
    whole = (h * factor, w * factor) if patches else ((h - 1) * factor + 1, (w - 1) * factor + 1)
    x = F.interpolate(x, size=whole, mode="bilinear", align_corners=not patches)
    return x[:, :, : size[0], : size[1]]


def image_to_map(points, stride, patches):
    """Converts points (..., 2) from image to map pixels, by the convention of `upsample`."""
    return (points + 0.5) / stride - 0.5 if patches else points / stride


class FPN(nn.Module):
    """Feature pyramid (Lin et al. 2017): 1x1 laterals, upsampled and added, 3x3 smoothing."""

    def __init__(self, in_channels, channels=256, patches=False):
        super().__init__()
        self.patches = patches
        self.laterals = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        for conv in (*self.laterals, *self.smooth):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")  # unit scale in and out
            nn.init.zeros_(conv.bias)

    def forward(self, features, scales=(0, 1, 2)):
        """[C2, C3, C4, C5] -> [P1, P2, P3], each (B, channels, H, W); None where not asked for."""
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
    predicted = logits > 0  # a probability over 0.5; exactly 0.5 is a no
    positive = labels > 0.5
    TP = (predicted & positive).sum(-2)
    P = positive.sum(-2)
    TN = (~(predicted | positive)).sum(-2)
    N = len(labels) - P
    return torch.stack(torch.broadcast_tensors(TP, P, TN, N))  # int64


def mean_accuracy(counts):
    """Eq. 14: mA = 1/(2L) sum_i (TP_i / P_i + TN_i / N_i); this is the term of each attribute i.

    counts (4, ..., L), see `label_counts` -> (TP / P + TN / N) / 2, (..., L), which is NaN for an
    attribute without positives or negatives; `.nanmean(-1)` gives mA. The paper prints 1/(2N)."""
    TP, P, TN, N = counts.double()
    return (TP / P + TN / N) / 2


class AFSS(nn.Module):
    """Eq. 4: x* = argmax over x in {P1, P2, P3} of mA(f_A(x), Y), for each group, after each epoch.

    For example, in a group of two attributes: over an epoch, the predictions from P1 have mA 0.70
    and 0.60, those from P2 0.75 and 0.65, and those from P3 0.80 and 0.50. The means are 0.65, 0.70
    and 0.65, so the group takes P2. In AFSS* each attribute chooses alone: P3 and P2.

    Call `update` after every step and `select` after every epoch, on every process. Without these
    calls every attribute uses P2. With a fixed mode or a frozen choice (`selecting = False`) they
    do nothing. `scales[j]` (0, 1 or 2) is the choice for attribute j, a Python int; scales that no
    attribute has chosen are not computed.

    mode: "group", "attribute" (a scale for each attribute, AFSS* of Tab. 1), or "P1", "P2" or "P3"
    (fixed). The state dict holds the choice and whether it is frozen, but not as a buffer: if you
    average weights (EMA, SWA, timm's), then after each epoch call
    `average.afss.set_extra_state(model.afss.get_extra_state())`."""

    def __init__(self, attribute_groups, mode="group"):
        super().__init__()
        L = len(attribute_groups)
        self.mode = mode
        self.selecting = mode in ("group", "attribute")
        self.scales = [1 if self.selecting else SCALES.index(mode)] * L
        # The attributes of one unit share a scale.
        self.units = list(attribute_groups) if mode == "group" else list(range(L))
        # (4, 3, L) int64 after the first `update`. Not a buffer: before each forward pass,
        # DistributedDataParallel overwrites the buffers of all processes with those of process 0.
        self.counts = None

    def get_extra_state(self):
        """For the state dict: the L scales, then 1 while selecting, else 0; (L + 1,) int64."""
        return torch.tensor([*self.scales, int(self.selecting)])

    def set_extra_state(self, state):
        *scales, selecting = state.tolist()
        fits = len(scales) == len(self.units) and {*scales} <= {0, 1, 2}
        if fits:  # one scale for each unit
            fits = len({*zip(self.units, scales, strict=True)}) == len({*self.units})
        if not fits or (self.mode in SCALES and scales != self.scales):
            raise ValueError(f"AFSS state {state.tolist()}: contradicts mode {self.mode}")
        self.scales = scales
        self.selecting = bool(selecting) and self.mode not in SCALES

    @torch.no_grad()
    def update(self, logits, labels):
        """Adds a batch to the counts: logits (3, B, L), labels (B, L)."""
        if not self.selecting:
            return
        shape = (3, len(labels), len(self.scales))
        if logits.shape != shape or labels.shape != shape[1:]:
            shapes = f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}"
            raise ValueError(f"AFSS.update: {shapes}, expected (3, B, L) and (B, L)")
        counts = label_counts(logits, labels)
        self.counts = counts if self.counts is None else self.counts + counts

    def select(self):
        """Chooses by the epoch's counts, summed over all processes, and clears them. Returns mA
        (3, L), or None if nothing was counted. A group whose mA is NaN keeps its scale."""
        if not self.selecting or self.counts is None:
            return None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.counts)
        mA = mean_accuracy(self.counts.cpu())
        self.counts = None
        for unit in set(self.units):
            members = [j for j, u in enumerate(self.units) if u == unit]
            score = mA[:, members].nanmean(1)  # (3,)
            if not score.isnan().any():
                best = score.argmax().item()  # ties go to the finest scale
                for j in members:
                    self.scales[j] = best
        return mA


# ---- Prior location extraction (Sec. 3.2.3, Eq. 5-9)
# Each PLE takes the map x*_g and the group g. Psi_agr, `pyramid_pool`, takes what it returns:
#   F_g = Psi_agr(Phi(x*_g, R_g))      Eq. 5, R_g the group's rows
#   F_g = Psi_agr(Phi(x*_g, P_n))      Eq. 7 and 9, P_n the group's keypoints or grid points


def prior_region(group, height):
    """Tab. A.11: the rows [top, bottom) of a group's region on a map of this height."""
    top, bottom = PRIOR_REGIONS[group]
    top = min(int(top * height + 0.5), height - 1)  # halves are rounded up
    return top, max(int(bottom * height + 0.5), top + 1)  # at least one row on tiny maps


# The point (1.25, 0.5) on a map of 4 columns lies between 4 corners:
#   corner (x, y)   (1, 0)   (2, 0)   (1, 1)   (2, 1)
#   corner_index    1        2        5        6       = image_start + 4 y + x
#   corner_share    0.375    0.125    0.375    0.125   such as (1 - 0.25) (1 - 0.5), times W_m
def bilinear_sample(x, points, W_m=None):
    """Bilinear sampling, zero outside the map: sum_m W_m x(P_m).

    x (B, C, H, W), points (B, N, M, 2) in pixels of x, W_m (B, N, M) -> (B, N, C). Without W_m: x
    at points (B, N, 2). Computed in float32 or better, returned in the dtype of x. torch's own
    function, whose points run from -1 to 1 between the outer edges of the map, gives the same:

        place = (2 * points + 1) / torch.tensor([W, H]) - 1
        terms = F.grid_sample(x, place, align_corners=False)  # (B, C, N, M)
        return (terms * W_m[:, None]).sum(3).transpose(1, 2)

    It materializes all M terms, whereas each bag below sums 4 M corners at once. That makes it
    three to six times slower on a CPU, and 1.3 times on an H200 at P1 and P2."""
    # Keep this cast: from pixel 2 on, bfloat16 resolves 1/64 pixel at best, and up to torch 2.10
    # CUDA has no bfloat16 gradient of `per_sample_weights`.
    dtype = torch.promote_types(x.dtype, torch.float32)
    points = points.to(dtype)
    if W_m is None:
        points = points.unsqueeze(2)
        W_m = torch.ones_like(points[..., 0])
    B, C, H, W = x.shape
    low = points.detach().floor()
    # To integers before the clamp: a NaN then indexes a valid pixel, and its NaN share spoils only
    # this point.
    corner = low.long()
    pixels = torch.stack([corner, corner + 1], -1)  # (B, N, M, 2, 2): of x and of y, neighbours
    columns = pixels[..., 0, :].clamp(0, W - 1)
    rows = pixels[..., 1, :].clamp(0, H - 1)
    inside = pixels == torch.stack([columns, rows], -2)
    fraction = points - low
    share = torch.stack([1 - fraction, fraction], -1) * inside  # zero outside the map

    image_start = H * W * torch.arange(B, device=x.device)
    row_start = image_start.view(B, 1, 1, 1) + W * rows
    corner_index = row_start.unsqueeze(-1) + columns.unsqueeze(-2)  # (B, N, M, 2, 2)
    corner_share = share[..., 1, :].unsqueeze(-1) * share[..., 0, :].unsqueeze(-2)
    corner_share = corner_share * W_m[..., None, None]
    bags = F.embedding_bag(
        corner_index.flatten(2).flatten(0, 1),
        x.permute(0, 2, 3, 1).reshape(B * H * W, C).to(dtype),
        mode="sum",
        per_sample_weights=corner_share.flatten(2).flatten(0, 1).to(dtype),
    )
    return bags.unflatten(0, points.shape[:2]).to(x.dtype)


class OffsetSampling(nn.Module):
    """Eq. 6 and 8: Phi(x, P_n) = A sum_m W_m x(P_n + dP_m), shared by all groups and scales.

    The paper prints sum_m A_m W_m x(P_n + dP_n): a matrix for each m, although the parameter counts
    of its Tab. 3 have no room for M of them, and an offset without m, which would make all M points
    one. `predict` turns x(P_n) into M offsets dP_m (map pixels) and M weights W_m (sum 1). Train it
    at a tenth of the learning rate: at the full rate, points leave the map. On CUDA the commands
    enable TF32, which rounds this layer too;
    `torch.set_float32_matmul_precision("highest")` turns it off."""

    # The points start on a ring around P_n: evenly spaced, since points that start together get
    # equal gradients and stay together, and off the pixels' rows and columns, where the gradient of
    # bilinear interpolation jumps. The latter holds for PLE-S's grids at 256x192 and 128x96 with M
    # up to 5 and ratio 0.75 or 1, not for every size and ratio.
    start_radius = 0.62  # map pixels
    start_angle = 13.55  # degrees

    def __init__(self, channels=256, M=3):
        super().__init__()
        self.M = M
        self.predict = nn.Linear(channels, 3 * M)  # M offsets (x, y), then M weights
        self.A = nn.Linear(channels, channels, bias=False)
        angle = 2 * torch.pi * (torch.arange(M) / M + self.start_angle / 360)
        ring = self.start_radius * torch.stack([angle.cos(), angle.sin()], 1)
        nn.init.zeros_(self.predict.weight)
        self.predict.bias.data = torch.cat([ring.flatten(), torch.zeros(M)])
        nn.init.eye_(self.A.weight)

    def forward(self, x, points):
        """x (B, C, H, W), points P_n (B, N, 2) in pixels of x -> (B, N, C)."""
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))  # once for both samplings
        reference = bilinear_sample(x, points)  # (B, N, C)
        # Not in autocast's bfloat16, where an offset of 0.6 pixels moves in steps of 1/256.
        with torch.autocast(x.device.type, enabled=False):
            predicted = self.predict(reference.to(self.predict.weight.dtype))
        offsets, weights = predicted.split([2 * self.M, self.M], 2)
        moved = points.unsqueeze(2) + offsets.unflatten(2, (self.M, 2))  # P_n + dP_m (B, N, M, 2)
        return self.A(bilinear_sample(x, moved, weights.softmax(2)).to(dtype))


class PLE_R(nn.Module):
    """Region prior, Phi_reg of Eq. 5: the rows R_g of the group. prior=False: the whole map."""

    def __init__(self, prior=True):
        super().__init__()
        self.prior = prior

    def forward(self, x, group, keypoints=None):
        """x (B, C, H, W) -> (B, C, h, W)."""
        top, bottom = prior_region(group if self.prior else "all", x.shape[2])
        return x[:, :, top:bottom]


class PLE_K(nn.Module):
    """Keypoint prior, Eq. 6: offset sampling at the group's keypoints. prior=False: at all 16."""

    def __init__(self, channels=256, M=3, offsets=True, prior=True):
        super().__init__()
        self.prior = prior
        self.sample = OffsetSampling(channels, M) if offsets else bilinear_sample

    def forward(self, x, group, keypoints):
        """x (B, C, H, W), keypoints (B, 16, 2) in pixels of x -> (B, C, n)."""
        if keypoints is None or keypoints.shape != (x.shape[0], 16, 2):
            raise ValueError("PLE-K: expected keypoints (B, 16, 2), in MPII's order")
        points = keypoints[:, KEYPOINT_GROUPS[group if self.prior else "all"]]
        return self.sample(x, points).transpose(1, 2)


class PLE_S(nn.Module):
    """Sparse prior, Eq. 8: offset sampling at a uniform grid over the group's region. ratio: the
    number of grid points as a share of the region's pixels (Fig. 6). prior=False: the whole map."""

    def __init__(self, channels=256, M=3, ratio=0.75, offsets=True, prior=True):
        super().__init__()
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio {ratio}: expected more than 0, at most 1")
        self.ratio = ratio
        self.prior = prior
        self.sample = OffsetSampling(channels, M) if offsets else bilinear_sample

    def points(self, group, height, width, device=None):
        """The grid on a map of this size, centred in the group's region: (rows, columns, 2)."""
        top, bottom = prior_region(group if self.prior else "all", height)
        rows = max(1, round((bottom - top) * self.ratio**0.5))
        columns = max(1, round(width * self.ratio**0.5))
        half_y = (bottom - top) / rows / 2  # half a step
        half_x = width / columns / 2
        y = torch.linspace(top + half_y - 0.5, bottom - half_y - 0.5, rows, device=device)
        x = torch.linspace(half_x - 0.5, width - half_x - 0.5, columns, device=device)
        return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)

    def forward(self, x, group, keypoints=None):
        """x (B, C, H, W) -> (B, C, rows, columns)."""
        grid = self.points(group, *x.shape[2:], x.device)
        points = grid.flatten(0, 1).expand(x.shape[0], -1, 2)
        return self.sample(x, points).transpose(1, 2).unflatten(2, grid.shape[:2])


# ---- Keypoints for PLE-K (Sec. 3.2.3; SimCC: Li et al., ECCV 2022, arXiv 2107.03332)


class SimCC(nn.Module):
    """Finds the 16 MPII points of one person by classifying the column and the row of each, over
    bins finer than pixels. The two classifiers are shared by all points, as in the original. They
    read one map per point, computed from P2 of a feature pyramid."""

    size = (128, 96)  # H, W of its input

    def __init__(self, backbone="mobilenet_v2", weights=None, channels=32):
        super().__init__()
        height, width = self.size
        self.backbone = Backbone(backbone, weights)
        self.fpn = FPN(self.backbone.out_channels, channels, self.backbone.patches)
        self.points = nn.Conv2d(channels, 16, 1)
        cells = (height // 8) * (width // 8)
        self.x = nn.Linear(cells, BINS * (width + 2 * MARGIN))
        self.y = nn.Linear(cells, BINS * (height + 2 * MARGIN))

    def forward(self, images):
        """(B, 3, 128, 96) -> logits of the columns (B, 16, 232) and of the rows (B, 16, 296)."""
        P2 = self.fpn(self.backbone(images), scales=[1])[1]
        maps = self.points(P2).flatten(2)  # (B, 16, 16 x 12)
        return self.x(maps), self.y(maps)


BINS = 2  # per pixel
MARGIN = 10  # pixels beside the image that have bins, too: a crop may end below the head's top
SIGMA = 2.0  # pixels, of the Gaussian targets
NEAR = 10  # pixels, see `simcc_decode`


def bin_centres(bins, device=None):
    """The bins' positions in pixels: (bins,)."""
    return (torch.arange(bins, device=device) + 0.5) / BINS - 0.5 - MARGIN


def simcc_target(place, bins):
    """A Gaussian around the place (...), in pixels -> (..., bins), sum 1. For NaN, which stands for
    an image without a person, all bins are equal."""
    distance = bin_centres(bins, place.device) - place.unsqueeze(-1)
    target = torch.exp(-0.5 * (distance / SIGMA) ** 2).nan_to_num(1)
    return target / target.sum(-1, keepdim=True).clamp(min=1e-6)


def simcc_loss(x, y, points):
    """Cross-entropy with the Gaussians, for columns and rows: SimCC's KL divergence, apart from a
    constant. x, y: logits of `SimCC`; points (B, 16, 2) in its pixels, NaN where there is nobody ->
    the mean over the points that have bins, a scalar."""
    loss = torch.zeros(points.shape[:2], device=points.device)
    outside = torch.zeros_like(loss, dtype=torch.bool)
    for logits, place in ((x, points[..., 0]), (y, points[..., 1])):
        bins = logits.shape[-1]
        loss = loss - (simcc_target(place, bins) * logits.log_softmax(-1)).sum(-1)
        outside = outside | (place < -0.5 - MARGIN) | (place > bins / BINS - 0.5 - MARGIN)
    return loss[~outside].mean()


def simcc_decode(x, y):
    """Logits of `SimCC` -> points (B, 16, 2) in pixels of its input, and a confidence (B, 16). A
    point is the mean of the bins within `NEAR` pixels of the likeliest one; its confidence is the
    probability of those bins, the column's times the row's."""
    places = []
    confidence = 1
    for logits in (x, y):
        centres = bin_centres(logits.shape[-1], logits.device)
        likeliest = centres[logits.argmax(-1)].unsqueeze(-1)
        near = logits.softmax(-1) * ((centres - likeliest).abs() <= NEAR)
        share = near.sum(-1)
        places.append((near * centres).sum(-1) / share)
        confidence = confidence * share
    return torch.stack(places, -1), confidence


def pyramid_pool(x):
    """Psi_agr of Eq. 5, 7 and 9: max pooling over the whole input and over four parts of it: 2x2
    cells of a map (B, C, h, w), or four runs of points (B, C, n) -> (B, 5 C). If the size does not
    divide, neighbouring parts overlap: 5 points give the runs 0-1, 1-2, 2-3 and 3-4."""
    parts = F.adaptive_max_pool2d(x, 2).flatten(2) if x.dim() == 4 else F.adaptive_max_pool1d(x, 4)
    whole = F.adaptive_max_pool1d(parts, 1)  # the maximum of the parts' maxima
    return torch.cat([whole.flatten(1), parts.flatten(1)], 1)


# ---- The model (Fig. 2, Eq. 1)
# Its shapes for 256x192 images, PLE-S at ratio 0.75, and the scales that the paper's AFSS chose:
#   group    map (C, H, W)          rows of the region   grid of points, each with 3 offset points
#   head     P1 (256, 64, 48)       0 to 23              21 x 42
#   torso    P2 (256, 32, 24)       4 to 19              14 x 21
#   bottom   P2 (256, 32, 24)       16 to 31             14 x 21
#   all      P3 (256, 16, 12)       0 to 15              14 x 10
# Each group's points are sampled to (B, 256, rows, columns) and pooled to F_g (B, 1280), which its
# head turns into (B, attributes of the group).


class SSPNet(nn.Module):
    """Backbone -> FPN -> AFSS -> PLE -> pyramid pooling -> one linear head per group.

    Args:
        attribute_groups: the group ("head", "torso", "bottom", "all") of each of the L attributes.
        ple: "R", "K" or "S"; offsets, prior: False ablates them (Tab. 2).
        backbone, weights: see `Backbone`; or a module that returns C2 to C5, and no weights.
        afss: the mode of `AFSS`; "P1", "P2" or "P3" is "without AFSS" in Tab. 2.
        M: offset points per prior point (Fig. 5). ratio: see `PLE_S` (Fig. 6).
        channels: C of P1, P2 and P3."""

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
        unknown = set(attribute_groups) - set(GROUPS)
        if unknown:
            raise ValueError(f"groups {sorted(unknown)}: expected some of {', '.join(GROUPS)}")
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
        self.members = {}
        self.heads = nn.ModuleDict()
        for group in (g for g in GROUPS if g in attribute_groups):
            members = [j for j, g in enumerate(attribute_groups) if g == group]
            self.members[group] = members
            self.heads[group] = nn.Linear(5 * channels, len(members))
            nn.init.normal_(self.heads[group].weight, std=0.01)
            nn.init.zeros_(self.heads[group].bias)

    def features(self, images, scales=None):
        """(B, 3, H, W) -> [P1, P2, P3], with None for scales that no attribute uses."""
        return self.fpn(self.backbone(images), self.afss.scales if scales is None else scales)

    def attribute_logits(self, maps, keypoints=None, scales=None):
        """F_g = Psi_agr(Phi(x*_g, P_n)) (Eq. 5, 7, 9), then the group's head: a list of L logits
        (B,). Attribute j is predicted from maps[scales[j]], by default AFSS's choice."""
        scales = self.afss.scales if scales is None else scales
        logits = [None] * len(scales)
        for group, members in self.members.items():
            for s in sorted({scales[j] for j in members}):  # one; with AFSS* up to three
                points = None
                if keypoints is not None:
                    points = image_to_map(keypoints, self.strides[s], self.patches)
                feature = pyramid_pool(self.ple(maps[s], group, points))  # F_g, (B, 5 C)
                group_logits = self.heads[group](feature).unbind(1)
                for j, logit in zip(members, group_logits, strict=True):
                    if scales[j] == s:
                        logits[j] = logit
        return logits

    def forward(self, images, keypoints=None):
        """images (B, 3, H, W), for PLE-K keypoints (B, 16, 2) in their pixels -> logits (B, L). In
        training mode (3, B, L), one for each scale that AFSS compares, or (1, B, L) once frozen."""
        if self.training and self.afss.selecting:
            maps = self.features(images, scales=(0, 1, 2))
            L = len(self.attribute_groups)
            by_scale = [self.attribute_logits(maps, keypoints, [s] * L) for s in range(3)]
            return torch.stack([torch.stack(logits, 1) for logits in by_scale])
        logits = torch.stack(self.attribute_logits(self.features(images), keypoints), 1)
        return logits[None] if self.training else logits

    def map_of(self, attribute):
        """The index in `features` of the map that predicts this attribute: A in Eq. 13."""
        return self.afss.scales[attribute]


class Baseline(nn.Module):
    """Strong Baseline (Jia et al. 2021): global average pooling of C5 and one linear layer."""

    strides = (32,)

    def __init__(self, attribute_groups, backbone="resnet50", weights=None):
        super().__init__()
        is_name = isinstance(backbone, str)
        self.backbone = Backbone(backbone, weights, pyramid=False) if is_name else backbone
        self.patches = getattr(self.backbone, "patches", False)
        self.head = nn.Linear(self.backbone.out_channels[-1], len(attribute_groups))

    def features(self, images):
        """(B, 3, H, W) -> [C5]."""
        return self.backbone(images)[-1:]

    def attribute_logits(self, maps, keypoints=None):
        """[C5] -> a list of L logits (B,)."""
        return list(self.head(maps[0].mean((2, 3))).unbind(1))

    def forward(self, images, keypoints=None):
        """(B, 3, H, W) -> logits (B, L); in training mode (1, B, L), as an SSPNet of one scale."""
        logits = torch.stack(self.attribute_logits(self.features(images)), 1)
        return logits[None] if self.training else logits

    def map_of(self, attribute):
        """The index in `features` of the map that predicts this attribute."""
        return 0


# ---- Hierarchical loss (Sec. 3.2.4, Eq. 10-12)


def imbalance_weights(labels, positive_ratio):
    """Eq. 11: w_j = exp(1 - r_j) for positive labels, else exp(r_j). labels (B, L), r (L,) ->
    (B, L). The paper prints the two cases the other way round, see tests/pages/paper.md."""
    return torch.where(labels > 0.5, (1 - positive_ratio).exp(), positive_ratio.exp())


def weighted_bce(logits, labels, positive_ratio):
    """Eq. 10: Loss = -1/N sum_i sum_j w_j (Y_ij log s(a_ij) + (1 - Y_ij) log(1 - s(a_ij))), with
    the minus sign that the paper leaves out, and before the sum over attributes j.

    logits a (..., B, L), labels Y (B, L) of 0 and 1, positive_ratio (L,) of the training set ->
    (L,), means over images (and scales)."""
    shape = logits.shape[-2], len(positive_ratio)
    if logits.shape[-2:] != shape or labels.shape != shape:
        shapes = f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}"
        raise ValueError(f"loss: {shapes}, expected (..., B, L) and (B, L) with L = {shape[1]}")
    labels = labels.to(logits.dtype)
    weights = imbalance_weights(labels, positive_ratio).expand_as(logits)
    labels = labels.expand_as(logits)
    bce = F.binary_cross_entropy_with_logits(logits, labels, weights, reduction="none")
    return bce.flatten(0, -2).mean(0)


class HierarchicalLoss(nn.Module):
    """Eq. 12: Loss_total = sum_g Loss_g, where Loss_g is Eq. 10 on a group's attributes. Since
    Eq. 10 is itself a sum over attributes, this equals Eq. 10 on all of them."""

    def __init__(self, attribute_groups, positive_ratio):
        super().__init__()
        positive_ratio = torch.as_tensor(positive_ratio)
        L = len(positive_ratio)
        if len(attribute_groups) != L:
            raise ValueError(f"loss: {len(attribute_groups)} groups, expected one for each of {L}")
        rows = []
        for group in sorted(set(attribute_groups)):
            rows.append([float(other == group) for other in attribute_groups])
        self.register_buffer("positive_ratio", positive_ratio)
        self.register_buffer("membership", torch.tensor(rows, dtype=positive_ratio.dtype))  # (G, L)

    def forward(self, logits, labels):
        """logits (..., B, L), labels (B, L) -> a scalar."""
        by_attribute = weighted_bce(logits, labels, self.positive_ratio)
        by_group = (self.membership * by_attribute).sum(1)  # Loss_g
        return by_group.sum()


# ---- Response maps (Sec. 3.2.5, Eq. 2 and 13)


def grad_cam_p(maps, gradients):
    """Eq. 13: ReLU(sum_k da_j/dA^k(x, y) A^k(x, y)), with a weight for each pixel and channel. maps
    A and gradients da_j/dA, (B, C, H, W) each -> (B, H, W). Known as HiResCAM, arXiv 2011.08891."""
    return (gradients * maps).sum(1).relu()


def grad_cam(maps, gradients):
    """Grad-CAM (Selvaraju et al. 2017): a weight for each channel, the mean of its gradients."""
    weights = gradients.mean((2, 3), keepdim=True)
    return (weights * maps).sum(1).relu()


def response_maps(model, images, attributes, keypoints=None, cam=grad_cam_p):
    """A_c(X) of Eq. 2 for several attributes c of a batch: from each attribute's logit the gradient
    flows back to the map that AFSS chose for it (C5 in the baseline). One pass serves the batch,
    since images do not mix in evaluation mode. It also works under `torch.inference_mode()`.

    model: an SSPNet or a Baseline in evaluation mode. images (B, 3, H, W), normalized. attributes:
    indices, or a function that chooses them by the logits (B, L). keypoints (B, 16, 2) in image
    pixels, for PLE-K -> logits (B, L), and {attribute: its response map (B, h, w)}, each at the
    size of the attribute's map."""
    if model.training:
        raise ValueError("response_maps: the model is in training mode, call model.eval() before")
    with torch.inference_mode(False):
        with torch.no_grad():
            maps = model.features(images)
        maps = [None if A is None else A.detach().requires_grad_() for A in maps]
        responses = {}
        with torch.enable_grad():
            by_attribute = model.attribute_logits(maps, keypoints)
            logits = torch.stack(by_attribute, 1).detach()
            for j in attributes(logits) if callable(attributes) else attributes:
                A = maps[model.map_of(j)]
                (gradients,) = torch.autograd.grad(by_attribute[j].sum(), A, retain_graph=True)
                responses[j] = cam(A.detach(), gradients)
        return logits, responses


def to_image(responses, stride, patches, input_size, image_size):
    """Lays response maps over the image: (K, h, w) -> (K, H, W) in [0, 1]; a constant map is all
    zeros. stride, patches: of the map in the model's input, see `upsample`. input_size, image_size:
    (H, W) of the model's input, and of the image that was resized to it."""
    heat = upsample(responses[None].float(), input_size, stride, patches)
    if tuple(image_size) != tuple(input_size):
        heat = F.interpolate(heat, size=image_size, mode="bilinear", align_corners=False)
    heat = heat[0] - heat[0].amin((1, 2), keepdim=True)
    heat = heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-20)
    # In a constant map, rounding errors would be stretched to [0, 1].
    constant = responses.amin((1, 2)) == responses.amax((1, 2))
    return heat.masked_fill(constant[:, None, None], 0)


# ---- Boxes (Eq. 3) and their measure (Sec. 4.5, Tab. 10)

THRESHOLD = 0.2  # of the heat map, which spans 0 to 1: pixels at or above it are inside the box


def heatmap_to_box(heat, threshold=THRESHOLD):
    """f_orm of Eq. 3: the rectangle around all pixels at or above the threshold, which the paper
    does not name. heat (H, W) in [0, 1] -> (left, top, right, bottom), or None."""
    hot = heat >= threshold
    columns = hot.any(0).cpu().nonzero().flatten().tolist()
    rows = hot.any(1).cpu().nonzero().flatten().tolist()
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if columns else None


def box_iou(a, b):
    """Intersection over union of two boxes; 0 if either is None or both are empty."""
    if a is None or b is None:
        return 0.0
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    either = area_a + area_b - width * height
    return float(width * height / either) if either else 0.0


# ---- Reading files


@contextmanager
def blame(name, what=None):
    """Turns whatever numpy, Pillow, torch or JSON raise inside, on an absent, damaged or foreign
    file, into an `InputError` of one line that begins with the file's name."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        said = f"{kind}{error}"
        if "weights_only" in said:  # torch's advice to read the file unsafely
            said = "it holds more than tensors and plain values"
        raise InputError(f"{name}: {what} ({said[:300]})" if what else f"{name}: {said}") from error


def read_tensors(file):
    """Reads tensors and plain values that torch saved; nothing in the file is executed."""
    return torch.load(file, map_location="cpu", weights_only=True)


def load_weights(net, file, classifier=()):
    """Loads a state dict file. Names that start with `classifier` may be missing or extra."""
    with blame(file, "not this network's state dict"):
        state = read_tensors(file)
        state = state.get("state_dict", state)
        state = {name: t for name, t in state.items() if not name.startswith(classifier)}
        missing, unexpected = net.load_state_dict(state, strict=False)
        for name in (*missing, *unexpected):
            if not name.startswith(classifier):
                raise InputError(f"{name} is missing or unexpected")
