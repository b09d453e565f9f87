"""The Run of reinforcement learning: its log has rewards where others have bounds."""
import common
from training.run import Run


class RewardRun(Run):
    """run.add(...) after each step; run.log(...) and run.finish() tell of rewards."""

    said = frozenset()

    def evaluates(self):
        """As of any Run, and before the first step: the model as it came."""
        return super().evaluates() or self.step == 0 and self.settings["eval_interval"] > 0

    def say_once(self, text):
        """A line that is said once in a run, whatever stands behind its " step " or colon."""
        kind = text.partition(" step ")[0].partition(":")[0]
        if kind not in self.said:
            self.say(f"note: {text}")
        self.said |= {kind}

    def add(self, **figures):
        """Figures of a step, numbers that are averaged until the next row of the log; the bar shows
        some of them."""
        self.figures.append({name: float(value) for name, value in figures.items()})
        means = self.means()
        shown = {name: f"{means[name]:.3f}" for name in ("reward", "solved", "kl", "clipped")}
        self.bar.set_postfix(shown, refresh=False)

    def means(self):
        """{name: mean of what was added}."""
        names = self.figures[0] if self.figures else ()
        return {name: sum(row[name] for row in self.figures) / len(self.figures) for name in names}

    def log(self, held_out, lr_factor):
        """A row of log.jsonl: what was added, and `held_out`, {name: number} with solve_rate,
        solve_stderr and val_reward."""
        self.held_out, means = held_out, self.means()
        train_loss = sum(self.losses) / len(self.losses) if self.losses else None
        if self.main:
            self.log_file.write(step=self.step, train_loss=train_loss, **means, **held_out,
                                tokens_per_s=self.bar.tokens_per_s(), lr_factor=lr_factor,
                                elapsed_s=self.clock.seconds())
        self.say(f"step {self.step}: {self.result()}")
        self.losses, self.figures = [], []

    def result(self):
        """The figures of the last evaluation, in words."""
        now = self.held_out
        return (f"solve rate {now['solve_rate']:.3f} +- {now['solve_stderr']:.3f}, "
                f"reward {now['val_reward']:.3f}")

    def finish(self):
        """Close the bar, draw reward.png, print the last line."""
        self.bar.close()
        if self.main and self.stopped:
            print(f"stopped at step {self.step}; --resume=True goes on from here")
        elif self.main:
            draw_rewards(self.log_file.rows, self.folder / "reward.png")
            print(self.result())


def draw_rewards(rows, path):
    """Reward of the answers that were learned from and held-out solve rate over minutes, where
    matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    minutes = [row["elapsed_s"] / 60 for row in rows]
    solved = [row["solve_rate"] for row in rows]
    errors = [row["solve_stderr"] for row in rows]
    axes.errorbar(minutes, solved, errors, marker="o", ms=3, label="held-out tasks solved")
    trained = [row for row in rows if "reward" in row]
    axes.plot([row["elapsed_s"] / 60 for row in trained], [row["reward"] for row in trained],
              alpha=0.6, label="reward of answers, training")
    axes.set(xlabel="minutes", ylabel="reward, solve rate")
    axes.legend()
    axes.grid(alpha=0.3)
    common.write_atomically(path, lambda name: figure.savefig(name, dpi=120, format="png"))
