"""Everything that can happen to replay shards, in any order, against a plain list of chunks."""

import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from test_replay import make_chunk
from test_shard import CONFIG, ROOMY, assert_whole, blocks, rows, seal

from worldflux_dist.replay import ReplayBuffer, ReplayShard


class Shards(RuleBasedStateMachine):
    """Everything that can happen to shards in a run, against a plain list of what was stored."""

    config = CONFIG
    resharding = False

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.life = self.incarnation = 0
        self.made, self.shards, self.states = [], [], []
        self.times, self.seq, self.late, self.sent = Counter(), 0, [], []
        self.open_shards(2 if self.resharding else 1, [])
        self.log = [[] for _ in self.shards]  # chunks in the order they were stored
        self.durable = [set() for _ in self.shards]

    def open_shards(self, num, states):
        self.life += 1
        self.shards = [self.open(index, num, states) for index in range(num)]

    def open(self, index, num, states=()):
        shard = ReplayShard(
            self.config, 5, Path(self.folder.name), f"{self.life:04}", index, num, states
        )
        self.made.append(shard)
        return shard

    def teardown(self):
        for shard in self.made:
            shard.close()
        self.folder.cleanup()

    def send(self, index, chunk):
        known = chunk.key in {c.key for c in self.log[index]}
        assert self.shards[index].add(chunk) == (0 if known else chunk.num_steps)
        if not known:
            self.log[index].append(chunk)

    @rule(
        streams=st.lists(st.integers(0, 3), min_size=1, unique=True),
        num=st.integers(1, 12),
        overtaken=st.booleans(),
    )
    def add(self, streams, num, overtaken):
        for index in range(len(self.shards)):
            mine = [s for s in streams if s % len(self.shards) == index]
            time = max((self.times[s] for s in mine), default=0)
            time += -time % 10 if len({self.times[s] for s in mine}) > 1 else 0
            if mine:
                life = f"{self.incarnation}"
                chunk = make_chunk(mine, time, num, self.seq, f"w/{index}", life)
                self.times.update({s: time + num - self.times[s] for s in mine})
                self.sent.append((index, chunk))
                if overtaken:
                    self.late.append((index, chunk))
                else:
                    self.send(index, chunk)
        self.seq += 1

    @precondition(lambda self: self.late)
    @rule()
    def a_late_chunk_arrives(self):
        self.send(*self.late.pop(0))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def send_again(self, data):
        index, chunk = data.draw(st.sampled_from(self.sent))
        self.late = [(i, c) for i, c in self.late if c is not chunk]
        self.send(index, chunk)

    @rule()
    def flush(self):
        for index, shard in enumerate(self.shards):
            shard.flush().result(10)
            self.durable[index] = {chunk.key for chunk in self.log[index]}
            assert all(shard.durable(key) for key in self.durable[index])

    @rule(data=st.data())
    def crash(self, data):
        index = data.draw(st.sampled_from(range(len(self.shards))))
        self.shards[index] = shard = self.open(index, len(self.shards))
        kept = [chunk for chunk in self.log[index] if chunk.key in shard.buffer.marks]
        assert self.durable[index] <= {chunk.key for chunk in kept}
        assert kept == self.log[index][: len(kept)]
        self.log[index] = kept

    @rule()
    def seal(self):
        self.states = [seal(shard) for shard in self.shards]
        self.sealed = [list(log) for log in self.log]
        self.durable = [{chunk.key for chunk in log} for log in self.log]

    @precondition(lambda self: self.states)
    @rule()
    def resume(self):
        self.log = [list(log) for log in self.sealed]
        self.durable = [{chunk.key for chunk in log} for log in self.log]
        self.begin_life(len(self.states))

    @precondition(lambda self: self.resharding)
    @rule(num=st.integers(1, 3))
    def reshard(self, num):
        self.seal()
        everything = [chunk for log in self.log for chunk in log]
        self.log = [
            [c.rows(c.streams % num == i) for c in everything if (c.streams % num == i).any()]
            for i in range(num)
        ]
        self.durable = [{chunk.key for chunk in log} for log in self.log]
        self.begin_life(num)

    def begin_life(self, num):
        self.open_shards(num, self.states)
        self.states, self.late, self.sent = [], [], []
        self.incarnation += 1
        # New runners begin new episodes.
        self.times = Counter({s: t + 20 - t % 10 for s, t in self.times.items()})

    @precondition(lambda self: self.states)
    @rule()
    def retain(self):
        names = {found["name"] for state in self.states for found in state["segments"]}
        for shard in self.shards:
            shard.retain(names)

    @invariant()
    def everything_is_there_once(self):
        for shard, log in zip(self.shards, self.log, strict=True):
            found = rows(shard)
            if self.resharding:  # nothing is evicted
                labels = [c.obs["obs"].reshape(-1, 2).astype(int).tolist() for c in log]
                assert found == Counter(tuple(row) for chunk in labels for row in chunk)
            else:
                buffer = ReplayBuffer(self.config)
                for chunk in log:
                    buffer.add(chunk)
                assert blocks(shard.buffer) == blocks(buffer)
                assert shard.buffer.numbering() == buffer.numbering()
            if shard.buffer.ready:
                assert_whole(shard.buffer.sample())


class ReshardedShards(Shards):
    config = ROOMY
    resharding = True


TestShards = Shards.TestCase
TestReshardedShards = ReshardedShards.TestCase
TestShards.settings = TestReshardedShards.settings = settings(
    max_examples=15,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
