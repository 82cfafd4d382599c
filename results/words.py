"""What the pages say around their figures, in both languages."""

from __future__ import annotations

from typing import Any

WORDS: dict[str, dict[str, Any]] = {
    "outcomes": {"en": "RL against its supervised start", "zh": "强化学习与它的监督起点"},
    "outcome columns": {
        "en": [
            "application",
            "model",
            "metric",
            "algorithm",
            "seeds",
            "test prompts",
            "baseline",
            "supervised start",
            "after RL",
            "change",
        ],
        "zh": ["应用", "模型", "指标", "算法", "种子数", "测试提示数", "基线", "监督起点", "RL 之后", "变化"],
    },
    "unexplained": {
        "en": "RL did not beat its start beyond the interval, and nobody has written down why yet.",
        "zh": "RL 没有超出区间地胜过起点，原因还没有人写下来。",
    },
    "alarm": {
        "en": "Alarms of seed {seeds}: {times}, the first: {message}.",
        "zh": "种子 {seeds} 的警报 {times} 次，第一次：{message}。",
    },
    "costs": {"en": "What it took", "zh": "花费"},
    "cost columns": {
        "en": [
            "application",
            "algorithm",
            "examples before RL",
            "episodes of RL",
            "tokens read, millions",
            "minutes of training",
            "TFLOP",
            "peak memory, GB",
            "machine",
            "commit, date",
        ],
        "zh": [
            "应用",
            "算法",
            "RL 之前的样例数",
            "RL 的片段数",
            "读过的词元，百万",
            "训练分钟数",
            "TFLOP",
            "内存峰值，GB",
            "机器",
            "提交、日期",
        ],
    },
    "study columns": {
        "en": ["arm", "seeds", "before", "after", "fitted to its best", "change"],
        "zh": ["分组", "种子数", "之前", "之后", "拟合最好样本之后", "变化"],
    },
    "metric of study": {
        "en": "`{metric}` on the test side, the same prompts for all arms of a seed. *Before*: the model that RL began "
        "with, or the whole run where it has no RL.",
        "zh": "测试侧的 `{metric}`，同一种子的各组用相同的提示。*之前*：RL（或没有 RL 的运行）开始时的模型。",
    },
    "others": {"en": "What else changed", "zh": "其他变化"},
    "other columns": {
        "en": ["application", "model", "algorithm", "measure", "supervised start", "after RL", "change"],
        "zh": ["应用", "模型", "算法", "指标", "监督起点", "RL 之后", "变化"],
    },
    "samples": {"en": "What they write", "zh": "它们写什么"},
    "sample columns": {"en": ["prompt", "before RL", "after RL"], "zh": ["提示", "RL 之前", "RL 之后"]},
    "of the runs": {"en": "{n} of {of} runs", "zh": "{of} 次运行中的 {n} 次"},
    "waiting": {"en": "Not measured yet", "zh": "尚未测量"},
    "none waiting": {"en": "Nothing of the plan.", "zh": "计划中没有剩余。"},
    "commands": {"en": "The commands", "zh": "命令"},
}
