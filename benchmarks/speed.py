"""Patches that change only the speed of training: what levers.py takes out of train.py, or puts in."""

import patching


@patching.named
def unfolded():
    """Frozen batch norms are not folded into their convolutions."""
    import folding

    patching.patch(folding, "fold", lambda _: lambda *_: 0)


@patching.named
def images_contiguous():
    """Images in torch's default memory layout, like trained weights, instead of channels_last."""
    from augment import Normalize

    patching.patch(Normalize, "forward", lambda forward: lambda self, images: forward(self, images).contiguous())


@patching.named
def folded_contiguous():
    """Folded weights in torch's default memory layout instead of channels_last."""
    import folding

    def folded_so(fold):
        def fold_contiguous(model, *rest):
            count = fold(model, *rest)
            contiguous_folds(model)
            return count

        return fold_contiguous

    patching.patch(folding, "fold", folded_so)


def contiguous_folds(model) -> None:
    """Bring a model's folded weights into torch's default memory layout."""
    import folding
    import smallmaps

    for module in model.modules():
        if isinstance(folded := vars(module).get("forward"), folding._FoldedConv):
            folded.weight = smallmaps.mark_constant(folded.weight.contiguous())


@patching.named
def weights_channels_last():
    """Weights in channels_last, as images are, instead of torch's default memory layout."""
    import torch

    import launch

    def in_that_layout(suited):
        return lambda *model_and_device: suited(*model_and_device).to(memory_format=torch.channels_last)

    patching.patch(launch, "suited", in_that_layout)


@patching.named
def small_maps_convolved():
    """Convolutions of small maps computed as such, not as matrix products."""
    import smallmaps

    patching.patch(smallmaps, "as_products", lambda _: lambda model: model)


@patching.named
def kernels_not_packed():
    """Kernels of frozen weights cut out and reordered at each use, like the kernels of weights that train."""
    import smallmaps

    patching.patch(smallmaps, "mark_constant", lambda _: lambda weight: weight)


@patching.named
def unfused():
    """Optimizers without torch's fused update."""
    import phases

    def make(real):
        class Unfused(real):
            found_inf = property(lambda self: None, lambda self, value: None)  # only fused ones heed it

            def __init__(self, parameters, fused, **options):
                super().__init__(parameters, **options)

        return Unfused

    for name in ("Adam", "AdamW", "SGD"):
        patching.patch(phases, name, make)


@patching.named
def read_in_each_step():
    """Loss and accuracy read as Python numbers in each step."""
    from metrics import Classification

    def reading(add):
        def read_and_add(self, losses, classes, labels):
            losses.mean().item(), (classes[:, 0] == labels).sum().item()
            add(self, losses, classes, labels)

        return read_and_add

    patching.patch(Classification, "add", reading)


@patching.named
def one_thread():
    """One thread, as accelerate launch sets on a CPU."""
    import os

    import launch

    os.environ.pop("OMP_NUM_THREADS", None)  # launch would keep a user's own number
    patching.patch(launch, "cores_per_process", lambda _: lambda: 1)


@patching.named
def glibc_as_it_is():
    """The allocator returns memory to the system and asks for it again in each step."""
    import launch

    patching.patch(launch, "tune_allocator", lambda _: lambda device: None)


@patching.named
def launched():
    """GPU kernels launched one by one in each step, not replayed as CUDA graphs."""
    import graphs

    patching.patch(graphs, "record", lambda _: lambda *_: False)
    patching.patch(graphs, "Replayed", lambda _: lambda function: function)


@patching.named
def images_in_memory():
    """Decoded images in the machine's memory; each batch is copied to the GPU."""
    import loading

    patching.patch(loading, "_takes_little", lambda _: lambda *_: False)


@patching.named
def no_grad_trunk():
    """ResNet's frozen trunk under an explicit no_grad."""
    import torch
    from timm.models.resnet import ResNet

    def forward_features(self, images):
        stages = (self.conv1, self.bn1, self.act1, self.maxpool, self.layer1, self.layer2, self.layer3, self.layer4)
        for stage in stages:
            frozen = not any(parameter.requires_grad for parameter in stage.parameters())
            with torch.set_grad_enabled(not frozen and torch.is_grad_enabled()):
                images = stage(images)
        return images

    patching.patch(ResNet, "forward_features", lambda _: forward_features)


@patching.named
def compiled():
    """torch.compile for the model of each phase (without CUDA graphs)."""
    import folding

    launched()

    def compiling(fold):
        def fold_and_compile(model, *rest):
            count = fold(model, *rest)
            model.compile()
            return count

        return fold_and_compile

    patching.patch(folding, "fold", compiling)
