//! One pod: open while it takes requests, by the cluster's word or by its own answer, whichever comes first.
//!
//! ```text
//!            says ready, or answers us                 fails a request
//!  closed ──────────────────────────────▶ open ──────────────────────────▶ suspect
//!    ▲                                     │ ▲  back-off; answers us, or      │
//!    │                                     │ │  the cluster still vouches     │
//!    │  says no longer ready, terminating  │ └────────────────────────────────┤
//!    └─────────────────────────────────────┴──────────────────────────────────┘
//! ```
//!
//! Our own probes only make things sooner. What the cluster calls ready comes back by its word, even if ours find fault
//! with the path or are slow; where they find that requests would fail as well, by the time the cluster would have noticed.
//!
//! Where the target needs pods of several groups, a pod that could be open waits in between until each has one that
//! answers; a pod that helps others goes no further.

use std::{future::pending, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    super::{
        sight::Sight,
        wake::{Wake, suspect, vacant},
    },
    Keeper,
};
use crate::{domain::Role, probe::Answer, state::Endpoint};

/// How often a suspect pod is asked while nobody waits for it.
const UNHURRIED: Duration = Duration::from_secs(1);

/// How long the cluster may take to notice that a pod has failed: three probes of the kubelet, by its defaults. Its word is
/// newer than a failure that was longer ago.
const NOTICED: Duration = Duration::from_secs(30);
/// How long the answers to others are waited for that would clear a pod which may not be asked.
const UNASKED: Duration = Duration::from_millis(50);

/// How long an answer that has begun may go on when its pod is dead. The object of a pod may be deleted by force while its
/// containers still run.
const GRACE: Duration = Duration::from_secs(30);

/// What the cluster says of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// Its own probes find it ready.
    Ready,
    NotReady,
    /// A readiness gate that it declares is not met, whatever it answers.
    Gated,
    /// It is about to go: nothing new is sent.
    Terminating,
    /// It is no endpoint of the target any more, and may live: another label takes it out of a Service.
    Gone,
    /// It has ended, or its object has: nobody answers what is in flight on it.
    Dead,
}

/// Looks after one pod.
pub(super) struct Pod {
    keeper: Arc<Keeper>,
    wake: Wake,
    endpoint: Arc<Endpoint>,
    role: Role,
    word: watch::Receiver<Word>,
    state: State,
    /// How many requests it gets when it opens; `None` leaves its limit as it is.
    limit: Option<u32>,
    /// Whether it was up before we came: then it is not cold.
    is_warm: bool,
    /// Whether the cluster has called it ready since it is open: then it closes when the cluster takes that back.
    is_vouched: bool,
    /// Whether its answer to us opens it. When the cluster has found it unready that was ready, it knows more than one
    /// path of it shows; until nobody listens there, since what comes then is another run of the server.
    is_trusted: bool,
    /// What it answered us last before it was open, if it found fault with our probe.
    rejected: Option<Answer>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Closed,
    /// It answers, and takes no requests: others are missing, or it only helps them.
    Waiting,
    Open,
    Suspect,
}

// === impl Pod ===

impl Pod {
    pub(super) fn new(
        keeper: Arc<Keeper>,
        endpoint: Arc<Endpoint>,
        role: Role,
        word: watch::Receiver<Word>,
        is_warm: bool,
    ) -> Self {
        let wake = Wake::new(keeper.gate.clone());
        let state = State::Closed;
        Self {
            keeper,
            wake,
            endpoint,
            role,
            word,
            state,
            limit: None,
            is_warm,
            is_vouched: false,
            is_trusted: true,
            rejected: None,
        }
    }

    /// Runs until the pod has gone and nothing is in flight on it.
    pub(super) async fn run(mut self) {
        loop {
            let word = *self.word.borrow_and_update();
            match (word, self.state) {
                (Word::Terminating | Word::Gone | Word::Dead, _) => {
                    self.close();
                    self.is_trusted = true;
                    if self.has_left(word).await {
                        return;
                    }
                }
                (Word::NotReady | Word::Gated, State::Waiting | State::Open | State::Suspect)
                    if self.is_vouched || word == Word::Gated =>
                {
                    self.is_trusted &= !self.is_vouched;
                    self.close();
                }
                (Word::NotReady, State::Closed) => self.answer().await,
                (Word::Gated, State::Closed) => drop(self.word.changed().await),
                (Word::Ready, State::Closed) => {
                    if let Some(answer) = self.rejected.take() {
                        self.keeper.overruled(&self.endpoint, &answer);
                    }
                    self.limit = Some(self.start());
                    self.turn(State::Waiting);
                    self.is_vouched = true;
                }
                (_, State::Waiting) => {
                    self.is_vouched |= word == Word::Ready;
                    self.wait().await;
                }
                (_, State::Open) => {
                    self.is_vouched |= word == Word::Ready;
                    let Self { keeper, wake, endpoint, word, .. } = &mut self;
                    let keeper: &Keeper = keeper;
                    tokio::select! {
                        biased; // the word first: it may explain why the pod fails
                        _ = word.changed() => {}
                        () = suspect(endpoint, || lives(keeper, endpoint)) => self.turn(State::Suspect),
                        () = keeper.completeness(false), if !keeper.groups.is_empty() => {
                            self.endpoint.retire();
                            self.limit = None;
                            self.turn(State::Waiting);
                        }
                        () = widen(keeper, wake, endpoint) => {}
                    }
                }
                (_, State::Suspect) => {
                    self.is_vouched |= word == Word::Ready;
                    self.recover().await;
                }
            }
            // Whoever says the words has gone: so has the keeper.
            if self.word.has_changed().is_err() {
                pending::<()>().await;
            }
        }
    }

    /// How many requests it gets at first.
    fn start(&mut self) -> u32 {
        match std::mem::take(&mut self.is_warm) {
            true => u32::MAX,
            false => self.keeper.gate.policy().concurrency.ramp_start,
        }
    }

    /// Waits until it has answered, or the cluster says something else. It is asked only while requests wait.
    async fn answer(&mut self) {
        let Self { keeper, wake, endpoint, word, is_trusted, rejected, .. } = self;
        let mut sight = Sight::new(keeper.gate.clone());
        let answered = async {
            loop {
                if !wake.is_wanted() {
                    sight.withdraw();
                }
                wake.wanted().await;
                let asked = Instant::now();
                if keeper.gate.policy().readiness.probe {
                    let answer = keeper.ask(endpoint).await;
                    sight.saw(endpoint.address(), &answer);
                    match answer {
                        Answer::Ready if *is_trusted => return,
                        Answer::Refused => *is_trusted = true,
                        answer => *rejected = Some(answer).filter(Answer::is_rejection),
                    }
                }
                sleep_until(asked + keeper.interval()).await;
            }
        };
        tokio::select! {
            biased; // the word first: it makes asking needless, or says that the pod is going
            _ = word.changed() => {}
            () = answered => {
                self.limit = Some(self.start());
                self.turn(State::Waiting);
            }
        }
    }

    /// Opens as soon as the target has all that it needs. Returns also when the cluster says something else.
    async fn wait(&mut self) {
        let keeper = self.keeper.clone();
        if self.role.helps {
            let _ = self.word.changed().await;
            return;
        }
        if !keeper.groups.is_empty() {
            tokio::select! {
                biased; // the word first: it may say that the pod is going
                _ = self.word.changed() => return,
                () = keeper.completeness(true) => {}
            }
        }
        self.open();
    }

    /// Waits until it has answered again, or the cluster's word is enough, or the cluster says something else.
    async fn recover(&mut self) {
        let keeper = self.keeper.clone();
        let Self { wake, endpoint, word, .. } = self;
        let is_called_ready = *word.borrow() == Word::Ready;
        let mut doubt = Some(Doubt::new(&keeper));
        let recovered = async {
            sleep(endpoint.backoff()).await;
            let failed = Instant::now();
            while keeper.gate.policy().readiness.probe || !is_called_ready {
                let asked = Instant::now();
                let answer = keeper.ask(endpoint).await;
                if answer.is_alive() {
                    endpoint.vouch();
                }
                if answer.is_ready() {
                    return;
                }
                let has_another_cause = answer.is_rejection() || matches!(answer, Answer::TimedOut(_));
                if is_called_ready && (has_another_cause || failed.elapsed() >= NOTICED) {
                    return keeper.overruled(endpoint, &answer);
                }
                doubt = None;
                sleep_until(asked + keeper.interval()).await;
                tokio::select! {
                    biased; // whoever waits is in a hurry
                    () = wake.wanted() => {}
                    () = sleep_until(asked + UNHURRIED) => {}
                }
            }
        };
        let has_recovered = tokio::select! {
            biased; // the word first: it may say that the pod is going
            _ = word.changed() => false,
            () = recovered => true,
        };
        if has_recovered {
            // It keeps the one request at a time that being suspect left it, and grows from there.
            self.limit = None;
            self.turn(State::Waiting);
        }
    }

    /// Waits until nothing is in flight on it any more and the cluster has forgotten it, and says so; or until the
    /// cluster says something else.
    async fn has_left(&mut self, word: Word) -> bool {
        let Self { endpoint, word: words, .. } = self;
        let left = async {
            if word == Word::Dead {
                sever(endpoint).await;
            }
            vacant(endpoint).await;
        };
        tokio::select! {
            biased; // a pod that is back is not to be forgotten
            _ = words.changed() => return false,
            () = left => {}
        }
        if matches!(word, Word::Gone | Word::Dead) {
            return true;
        }
        let _ = self.word.changed().await;
        false
    }

    fn open(&mut self) {
        let limit = self.limit;
        match &self.keeper.behind {
            Some(pods) => {
                self.keeper.gate.cold_starts().pod_loaded(self.endpoint.address());
                pods.ready(&self.endpoint, limit);
            }
            None => self.keeper.open(&self.wake, &self.endpoint, limit),
        }
        self.turn(State::Open);
    }

    fn close(&mut self) {
        self.is_vouched = false;
        self.endpoint.retire();
        self.turn(State::Closed);
    }

    fn turn(&mut self, state: State) {
        let (was, is) = (u32::from(self.state == State::Open), u32::from(state == State::Open));
        let answers = |state| u32::from(matches!(state, State::Waiting | State::Open));
        let (answered, now_answers) = (answers(self.state), answers(state));
        let groups = self.role.groups;
        self.state = state;
        let is_endpoint = self.keeper.behind.is_none();
        self.keeper.count(|tally| {
            tally.pods = tally.pods + is - was;
            for (_, count) in
                tally.groups.iter_mut().enumerate().filter(|(index, _)| groups >> index & 1 == 1)
            {
                *count = *count + now_answers - answered;
            }
            if is_endpoint {
                tally.open = tally.open + is - was;
            }
        });
    }
}

/// Widens the ramp of a pod. Never ends; cancel-safe. Behind a gateway it has none: that one has.
async fn widen(keeper: &Keeper, wake: &Wake, pod: &Endpoint) {
    if keeper.behind.is_some() {
        return pending().await;
    }
    wake.widen(pod, || keeper.ask_if_allowed(pod)).await;
}

/// Breaks off what is in flight on a pod that is dead: at once what has not been answered, which goes elsewhere, and after
/// the grace what has begun to be.
async fn sever(endpoint: &Endpoint) {
    endpoint.sever(false);
    if timeout(GRACE, vacant(endpoint)).await.is_err() {
        endpoint.sever(true);
    }
}

/// Whether a pod answers, having broken a request off. Where it is not asked, only its answers to others can say so.
async fn lives(keeper: &Keeper, endpoint: &Endpoint) -> Answer {
    if keeper.gate.policy().readiness.probe {
        return keeper.ask(endpoint).await;
    }
    sleep(UNASKED).await;
    Answer::TimedOut(UNASKED.into())
}

/// A pod that failed a request, until it has failed to answer us, too.
struct Doubt<'a>(&'a Keeper);

impl<'a> Doubt<'a> {
    fn new(keeper: &'a Keeper) -> Self {
        keeper.count(|tally| tally.doubtful += 1);
        Self(keeper)
    }
}

impl Drop for Doubt<'_> {
    fn drop(&mut self) {
        self.0.count(|tally| tally.doubtful -= 1);
    }
}
