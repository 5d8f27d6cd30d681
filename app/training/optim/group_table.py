"""Tables of the parameter groups of optimizers."""

from __future__ import annotations

import pandas as pd

from app.training.optim.chained_optimizer import classes_of_groups
from app.training.optim.optim_wrapper import OptimWrapperDict
from app.training.optim.parameter_groups import label

MAX_NAMES = 3  # of a group in the log


def describe_optimizers(optimizers: OptimWrapperDict) -> str:
    """Return the class of each optimizer, and whether it steps in one fused kernel."""
    names = {
        f"{kind} (fused)" if group.get("fused") else kind: None
        for wrapper in optimizers.wrappers.values()
        for kind, group in zip(
            classes_of_groups(wrapper.optimizer), wrapper.optimizer.param_groups, strict=True
        )
    }
    return ", ".join(names)


def group_table(optimizers: OptimWrapperDict) -> pd.DataFrame:
    """Return a table with one row per parameter: its group, optimizer and options."""
    rows = []
    for wrapper_name, wrapper in optimizers.wrappers.items():
        groups = wrapper.optimizer.param_groups
        for place, kind in enumerate(classes_of_groups(wrapper.optimizer)):
            group = groups[place]
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                rows.append(
                    {
                        "number": f"{wrapper_name}{place}",
                        "group": ": ".join(filter(None, (wrapper_name, label(group)))),
                        "optimizer": kind,
                        "parameter": name,
                        "shape": str([*parameter.shape]),
                        "elements": parameter.numel(),
                        "lr": group["base_lr"],
                        "weight_decay": group.get("weight_decay", 0.0),
                    }
                )
    return pd.DataFrame(rows)


def describe_groups(table: pd.DataFrame) -> str:
    """Return one line per group: its options, how many elements it has, and what it contains."""
    lines = []
    for _, rows in table.groupby("number", sort=False):
        names, first = [*rows["parameter"]], rows.iloc[0]
        more = f", ... ({len(names)} in all)" if len(names) > MAX_NAMES else ""
        lines.append(
            {
                "group": first["group"],
                "optimizer": first["optimizer"],
                "lr": f"{first['lr']:.3g}",
                "weight decay": f"{first['weight_decay']:g}",
                "elements": f"{rows['elements'].sum():,}",
                "parameters": ", ".join(names[:MAX_NAMES]) + more,
            }
        )
    return pd.DataFrame(lines).to_string(index=False)
