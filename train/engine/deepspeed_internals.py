"""All uses of DeepSpeed's undocumented attributes, as they are in DeepSpeed 0.19.

Check this file when DeepSpeed is upgraded. The rest of the program relies on it for:

- fragments (`partitions`): where this rank's part of the fp32 weights (the *masters*) lies, and of which parameters;
- EMA and loading (`publish_masters`): setting the weights that the network computes with from the masters;
- gradients that are computed, clipped and skipped here: the order of the parameters, and the reduced gradients, at
  ZeRO 1 and 2;
- checkpoints and the guard: the state of DeepSpeed's own loss scaler, used at ZeRO 3 and with offloading.

`engine` is a DeepSpeedEngine and `optimizer` its `optimizer`: a DeepSpeedZeroOptimizer at ZeRO 1 and 2, a
DeepSpeedZeroOptimizer_Stage3 at ZeRO 3.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from train.engine.flat import FlatGroup

# The state of DeepSpeed's dynamic loss scaler. Its other attributes are settings.
LOSS_SCALE = {"cur_scale", "cur_iter", "last_overflow_iter"}


class Place(NamedTuple):
    """Elements [start, start + numel) of a flattened parameter lie at [offset, offset + numel) of an fp32 tensor."""

    start: int
    offset: int
    numel: int


# Parameters, the flat fp32 tensor with this rank's share of them, and each parameter's place in it.
Partition = tuple[list[nn.Parameter], Tensor, list[Place]]


def partitions(optimizer: Any, stage: int, rank: int) -> Iterator[Partition]:
    """This rank's fp32 tensors at ZeRO 1 to 3, one per parameter group."""
    return _partitions_3(optimizer, rank) if stage == 3 else _partitions_1_2(optimizer, rank)


def _partitions_1_2(optimizer: Any, rank: int) -> Iterator[Partition]:
    """A group's parameters are concatenated and cut into `world` equal partitions; a parameter may lie in several."""
    # single_partition_of_fp32_groups: per group, this rank's partition of the masters.
    for index, master in enumerate(optimizer.single_partition_of_fp32_groups):
        # round_robin_bit16_groups, round_robin_bit16_offsets: the group's parameters in the order of concatenation, and
        # where each begins.
        group, offsets = optimizer.round_robin_bit16_groups[index], optimizer.round_robin_bit16_offsets[index]
        # partition_size: elements of a partition, padding included.
        first = rank * optimizer.partition_size[index]
        places = []
        for parameter, offset in zip(group, offsets, strict=True):
            low = min(max(offset, first), first + master.numel())
            high = min(max(offset + parameter.numel(), first), first + master.numel())
            places.append(Place(low - offset, low - first, high - low))
        yield group, master, places


def _partitions_3(optimizer: Any, rank: int) -> Iterator[Partition]:
    """Each parameter is cut into `world` equal parts; a rank's parts of a group's parameters are concatenated."""
    # fp16_groups: the parameters of each group, whatever their type. fp32_partitioned_groups_flat: per group, this
    # rank's masters.
    for group, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset, places = 0, []
        for parameter in group:
            # parameter.ds_numel: elements of the whole parameter. parameter.ds_tensor: this rank's part, whose ds_numel
            # is the same on all ranks, so that the last parts may be padding.
            part = parameter.ds_tensor.ds_numel
            start = min(rank * part, parameter.ds_numel)
            places.append(Place(start, offset, min(part, parameter.ds_numel - start)))
            offset += part
        yield group, master, places


def publish_masters(optimizer: Any, stage: int) -> None:
    """Set the network's weights on all ranks to the values of the masters, at ZeRO 1 to 3."""
    if stage < 3:
        # update_lp_params: copy the masters into the network's weights and gather the other ranks'.
        optimizer.update_lp_params()
        return
    # _partition_all_parameters: release gathered weights. Those gathered at the moment would otherwise keep their old
    # values.
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp16_groups)):
        # _reassign_or_swap_out_partitioned_parameters: copy a group's masters into this rank's parts of the weights.
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    # persistent_parameters: the small parameters that every rank keeps whole. They are gathered again only here.
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def flat_groups(optimizer: Any) -> list[FlatGroup]:
    """ZeRO 1 and 2: the parameter groups in the order in which they are concatenated and cut into partitions."""
    return [
        FlatGroup(list(group), list(offsets), size * optimizer.partition_count[index])
        for index, (group, offsets, size) in enumerate(
            zip(
                optimizer.round_robin_bit16_groups,
                optimizer.round_robin_bit16_offsets,
                optimizer.partition_size,
                strict=True,
            )
        )
    ]


def set_reduced_gradients(optimizer: Any, partitions: Sequence[Tensor]) -> None:
    """ZeRO 1 and 2: set the step's gradient, of which this rank has a partition per group."""
    # averaged_gradients: per group, the reduced gradients in this rank's partition. Applying a step empties it.
    for index, partition in enumerate(partitions):
        optimizer.averaged_gradients[index] = [partition]


def drop_reduced_gradients(optimizer: Any) -> None:
    """ZeRO 1 and 2: drop the gradients of a step that DeepSpeed did not apply. It would add the next step's to them."""
    optimizer.averaged_gradients.clear()


def keep_minimum_loss_scale(optimizer: Any) -> None:
    """Let the loss scaler stay at its minimum after further overflows.

    DeepSpeed would raise; here the guard ends such a run.
    """
    optimizer.loss_scaler.raise_error_at_min_scale = False


def loss_scale_state(optimizer: Any, averaged: int) -> dict[str, float]:
    """The loss scaler's state. averaged: the number of ranks over whose gradients DeepSpeed averages, or 1.

    The state holds the scale times `averaged`, and restoring it divides by `averaged`. Gradients then overflow in the
    same steps on any number of ranks.
    """
    state = {key: getattr(optimizer.loss_scaler, key) for key in LOSS_SCALE}
    return {**state, "cur_scale": state["cur_scale"] * averaged}


def set_loss_scale_state(optimizer: Any, state: dict[str, float], averaged: int) -> None:
    """Restore the loss scaler's state. Settings among `state`, which older checkpoints contain, are ignored."""
    for key in LOSS_SCALE & state.keys():
        setattr(optimizer.loss_scaler, key, state[key] / averaged if key == "cur_scale" else state[key])


def skip_shared_memory_extension() -> None:
    """Keep DeepSpeed from compiling a C++ extension that only its inference uses, which takes most of a minute."""
    from deepspeed.ops import __compatible_ops__

    # __compatible_ops__: which extensions can be built on this machine.
    __compatible_ops__["deepspeed_shm_comm"] = False
