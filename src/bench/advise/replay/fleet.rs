//! Replicas of a route and their running time.

/// Running time of replicas in milliseconds, by activity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GpuTime {
    /// Ready, with requests in flight.
    pub serving: u64,
    /// Ready, without requests.
    pub idle: u64,
    /// Starting.
    pub cold: u64,
}

/// All existing replicas.
#[derive(Debug)]
pub(super) struct Fleet {
    replicas: Vec<SimulatedReplica>,
    next_id: u64,
    gpu: GpuTime,
}

#[derive(Debug)]
struct SimulatedReplica {
    id: u64,
    state: ReplicaState,
    in_flight: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReplicaState {
    Starting,
    Ready,
    /// Gets no further requests and is removed after its last answer.
    Draining,
}

// === impl GpuTime ===

impl GpuTime {
    pub const fn total(&self) -> u64 {
        self.serving + self.idle + self.cold
    }
}

// === impl Fleet ===

impl Fleet {
    /// Creates a fleet with ready replicas.
    pub(super) fn with_ready(count: u32) -> Self {
        let mut fleet = Self { replicas: Vec::new(), next_id: 0, gpu: GpuTime::default() };
        for _ in 0..count {
            let id = fleet.start();
            fleet.set_ready(id);
        }
        fleet
    }

    /// Starts a replica and returns its id.
    pub(super) fn start(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.replicas.push(SimulatedReplica { id, state: ReplicaState::Starting, in_flight: 0 });
        id
    }

    /// Marks a replica as ready. Returns `false` if it has been removed.
    pub(super) fn set_ready(&mut self, id: u64) -> bool {
        let found = self.replicas.iter_mut().find(|replica| replica.id == id);
        found.is_some_and(|replica| {
            replica.state = ReplicaState::Ready;
            true
        })
    }

    /// Returns `spec.replicas`: all but draining replicas.
    pub(super) fn desired(&self) -> u32 {
        let staying = self.replicas.iter().filter(|replica| replica.state != ReplicaState::Draining).count();
        u32::try_from(staying).unwrap_or(u32::MAX)
    }

    pub(super) fn has_ready(&self) -> bool {
        self.replicas.iter().any(|replica| replica.state == ReplicaState::Ready)
    }

    pub(super) fn in_flight(&self) -> u64 {
        self.replicas.iter().map(|replica| u64::from(replica.in_flight)).sum()
    }

    /// Takes a slot on the least loaded ready replica, if it has fewer than `max` requests.
    pub(super) fn acquire(&mut self, max: u32) -> Option<u64> {
        let ready = self.replicas.iter_mut().filter(|replica| replica.state == ReplicaState::Ready);
        let replica =
            ready.min_by_key(|replica| replica.in_flight).filter(|replica| replica.in_flight < max)?;
        replica.in_flight += 1;
        Some(replica.id)
    }

    /// Releases a slot of a replica.
    pub(super) fn release(&mut self, id: u64) {
        let Some(index) = self.replicas.iter().position(|replica| replica.id == id) else { return };
        let replica = &mut self.replicas[index];
        replica.in_flight = replica.in_flight.saturating_sub(1);
        if replica.state == ReplicaState::Draining && replica.in_flight == 0 {
            self.replicas.remove(index);
        }
    }

    /// Removes a replica: one that is not ready, else the least loaded; among equals the youngest.
    pub(super) fn remove_one(&mut self) {
        let staying =
            self.replicas.iter().enumerate().filter(|(_, replica)| replica.state != ReplicaState::Draining);
        let last = staying.min_by_key(|(_, replica)| {
            (replica.state == ReplicaState::Ready, replica.in_flight, std::cmp::Reverse(replica.id))
        });
        let Some((index, _)) = last else { return };
        if self.replicas[index].in_flight == 0 {
            self.replicas.remove(index);
        } else {
            self.replicas[index].state = ReplicaState::Draining;
        }
    }

    /// Removes all replicas, which must be idle.
    pub(super) fn remove_all(&mut self) {
        self.replicas.clear();
    }

    /// Accounts for `from..to` in the current state.
    pub(super) fn add_time(&mut self, from: u64, to: u64) {
        let took = to.saturating_sub(from);
        for replica in &self.replicas {
            let spent = match (replica.state, replica.in_flight) {
                (ReplicaState::Starting, _) => &mut self.gpu.cold,
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
