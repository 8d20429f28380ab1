"""torch: EmbeddingBag or Embedding with sparse gradients, and the optimizer that takes them; and FBGEMM's fused tables.

torch's best form: bags as a 2-D tensor of int32, gradients set to None, and beside SparseAdam, which takes sparse
gradients only, Adam for the head. FBGEMM updates the table in the backward pass; it has no Adam on CPU. It takes ids
feature by feature with offsets, made before anything is timed. Both use all cores; torch a GPU if there is one.
"""

from collections.abc import Callable
from typing import Any

from tests.benchmarks import workloads
from tests.benchmarks.workloads import ADAM, EPS, RATES, Case, Made


def make(contestant: str, case: Case) -> Made:
    import torch

    on_gpu = torch.cuda.is_available() and contestant == "torch"
    device = torch.device("cuda" if on_gpu else "cpu")
    ids, labels, values = (None if x is None else torch.from_numpy(x).to(device) for x in workloads.make_batches(case))
    head = torch.nn.Parameter(torch.from_numpy(workloads.initial_head(case)).to(device))
    read, table, trained = _fbgemm(case, ids) if contestant == "fbgemm" else _torch(case, ids, values)
    optimizers = _optimizers(case, trained, head)

    def step(i: int) -> Any:
        out = read(i)
        logits = (torch.tanh(out) if case.model == "linear" else out) @ head
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[i])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()
        return loss.detach()

    return step, lambda ids: table.detach()[torch.from_numpy(ids).to(device)].cpu().numpy()


def _optimizers(case: Case, tables: list[Any], head: Any) -> list[Any]:
    from torch import optim

    if case.rule == "adam":
        settings = {"lr": ADAM["lr"], "betas": (ADAM["b1"], ADAM["b2"]), "eps": ADAM["eps"]}
        return [optim.SparseAdam(tables, **settings), optim.Adam([head], **settings)]
    if case.rule == "sgd":
        return [optim.SGD([*tables, head], RATES["sgd"])]
    return [optim.Adagrad([*tables, head], RATES[case.rule], eps=EPS)]


def _torch(case: Case, ids: Any, values: Any) -> tuple[Callable[[int], Any], Any, list[Any]]:
    """How a batch is read, the table, and what of it the optimizer has to train."""
    import torch
    from torch.nn import functional

    table = torch.nn.Parameter(torch.empty(case.num_rows, case.dim, device=ids.device))
    table.data.copy_(torch.from_numpy(workloads.initial_table(case)))

    def read(i: int) -> Any:
        if case.model == "fields":
            return functional.embedding(ids[i], table, sparse=True).flatten(1)
        if case.model == "bag":
            return functional.embedding_bag(ids[i], table, mode="mean", sparse=True)
        return functional.embedding_bag(ids[i], table, mode="sum", sparse=True, per_sample_weights=values[i])

    return read, table, [table]


def _fbgemm(case: Case, ids: Any) -> tuple[Callable[[int], Any], Any, list[Any]]:
    import torch
    from fbgemm_gpu import split_table_batched_embeddings_ops_training as fbgemm

    rules = {"adagrad": "EXACT_ADAGRAD", "rowwise_adagrad": "EXACT_ROWWISE_ADAGRAD", "sgd": "EXACT_SGD"}
    fields = case.length if case.model == "fields" else 1  # features of one id each, all of the one table
    tables = fbgemm.SplitTableBatchedEmbeddingBagsCodegen(
        [(case.num_rows, case.dim, fbgemm.EmbeddingLocation.HOST, fbgemm.ComputeDevice.CPU)],
        feature_table_map=[0] * fields,
        optimizer=fbgemm.OptimType[rules[case.rule]],
        learning_rate=RATES[case.rule],
        eps=EPS,
        pooling_mode=fbgemm.PoolingMode.MEAN,
        device=ids.device,
    )
    table = tables.split_embedding_weights()[0]
    table.copy_(torch.from_numpy(workloads.initial_table(case)))
    by_feature = ids.long().reshape(len(ids), case.batch, fields, -1).transpose(1, 2).flatten(1)
    offsets = torch.arange(0, by_feature.shape[1] + 1, case.length // fields)
    return lambda i: tables(by_feature[i], offsets), table, []
