//! The replicas of a route, and how long they are up.

/// How long replicas were up, in milliseconds, by what they did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GpuTime {
    /// With a request in flight.
    pub serving: u64,
    /// Ready, with nothing to do.
    pub idle: u64,
    /// Asked for, and not ready yet.
    pub cold: u64,
}

/// The replicas that there are.
#[derive(Debug)]
pub(super) struct Fleet {
    replicas: Vec<Replica>,
    next_id: u64,
    gpu: GpuTime,
}

#[derive(Debug)]
struct Replica {
    id: u64,
    stage: Stage,
    in_flight: u32,
}

/// Where a replica is between its start and its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Starting,
    Ready,
    /// It gets nothing more, and is gone when its last answer ends.
    Leaving,
}

// === impl GpuTime ===

impl GpuTime {
    /// All of it.
    pub const fn total(&self) -> u64 {
        self.serving + self.idle + self.cold
    }
}

// === impl Fleet ===

impl Fleet {
    /// So many are ready at the beginning.
    pub(super) fn up(count: u32) -> Self {
        let mut fleet = Self { replicas: Vec::new(), next_id: 0, gpu: GpuTime::default() };
        for _ in 0..count {
            let id = fleet.start();
            fleet.ready(id);
        }
        fleet
    }

    /// Starts one; says which.
    pub(super) fn start(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.replicas.push(Replica { id, stage: Stage::Starting, in_flight: 0 });
        id
    }

    /// It is ready; false: it has been removed.
    pub(super) fn ready(&mut self, id: u64) -> bool {
        let found = self.replicas.iter_mut().find(|replica| replica.id == id);
        found.is_some_and(|replica| {
            replica.stage = Stage::Ready;
            true
        })
    }

    /// How many are asked for: `spec.replicas`.
    pub(super) fn wanted(&self) -> u32 {
        let staying = self.replicas.iter().filter(|replica| replica.stage != Stage::Leaving).count();
        u32::try_from(staying).unwrap_or(u32::MAX)
    }

    pub(super) fn has_ready(&self) -> bool {
        self.replicas.iter().any(|replica| replica.stage == Stage::Ready)
    }

    pub(super) fn in_flight(&self) -> u64 {
        self.replicas.iter().map(|replica| u64::from(replica.in_flight)).sum()
    }

    /// A place on the ready replica with the fewest requests, if that has fewer than `max`.
    pub(super) fn take(&mut self, max: u32) -> Option<u64> {
        let ready = self.replicas.iter_mut().filter(|replica| replica.stage == Stage::Ready);
        let replica =
            ready.min_by_key(|replica| replica.in_flight).filter(|replica| replica.in_flight < max)?;
        replica.in_flight += 1;
        Some(replica.id)
    }

    /// One of its requests has been answered.
    pub(super) fn answered(&mut self, id: u64) {
        let Some(index) = self.replicas.iter().position(|replica| replica.id == id) else { return };
        let replica = &mut self.replicas[index];
        replica.in_flight = replica.in_flight.saturating_sub(1);
        if replica.stage == Stage::Leaving && replica.in_flight == 0 {
            self.replicas.remove(index);
        }
    }

    /// One goes: one that is not ready, else the one with the fewest requests; of equals the youngest.
    pub(super) fn remove_one(&mut self) {
        let staying = self.replicas.iter().enumerate().filter(|(_, replica)| replica.stage != Stage::Leaving);
        let last = staying.min_by_key(|(_, replica)| {
            (replica.stage == Stage::Ready, replica.in_flight, std::cmp::Reverse(replica.id))
        });
        let Some((index, _)) = last else { return };
        if self.replicas[index].in_flight == 0 {
            self.replicas.remove(index);
        } else {
            self.replicas[index].stage = Stage::Leaving;
        }
    }

    /// All go. Nothing is in flight.
    pub(super) fn remove_all(&mut self) {
        self.replicas.clear();
    }

    /// Time passes, in which nothing changes.
    pub(super) fn spend(&mut self, from: u64, to: u64) {
        let took = to.saturating_sub(from);
        for replica in &self.replicas {
            let spent = match (replica.stage, replica.in_flight) {
                (Stage::Starting, _) => &mut self.gpu.cold,
                (_, 0) => &mut self.gpu.idle,
                _ => &mut self.gpu.serving,
            };
            *spent += took;
        }
    }

    pub(super) const fn gpu_time(&self) -> GpuTime {
        self.gpu
    }
}
