//! Atomics and the mutex of loom, in place of those in `src/sync.rs`.

use parking_lot::Mutex as Global;

/// Implementation of the orders in the source.
///
/// loom has no total order of sequentially consistent accesses, but of fences. Accesses that acquire and release are
/// sequentially consistent with a fence before each, or with one after each; compilers use either. If an access is too
/// weak, one of the two fails where the other may not.
#[derive(Clone, Copy, Debug)]
pub enum Orders {
    FenceBefore,
    FenceAfter,
    AcquireRelease,
    Relaxed,
}

static ORDERS: Global<Orders> = Global::new(Orders::Relaxed);

impl Orders {
    /// Makes all accesses use these orders from now on.
    pub fn apply(self) {
        *ORDERS.lock() = self;
    }
}

pub mod atomic {
    pub use std::sync::atomic::Ordering;

    use loom::sync::atomic::fence;

    use super::{ORDERS, Orders};

    /// Runs an access with its order; with `weaker`, and perhaps a fence, in place of a sequentially consistent one.
    fn ordered<T>(order: Ordering, weaker: Ordering, access: impl FnOnce(Ordering) -> T) -> T {
        let orders = *ORDERS.lock();
        match (orders, order) {
            (Orders::Relaxed, _) => access(Ordering::Relaxed),
            (Orders::FenceBefore, Ordering::SeqCst) => {
                fence(Ordering::SeqCst);
                access(weaker)
            }
            (Orders::FenceAfter, Ordering::SeqCst) => {
                let result = access(weaker);
                fence(Ordering::SeqCst);
                result
            }
            (Orders::AcquireRelease, Ordering::SeqCst) => access(weaker),
            _ => access(order),
        }
    }

    macro_rules! atomics {
        ($($name:ident: $value:ty),*) => {$(
            #[derive(Debug)]
            pub struct $name(loom::sync::atomic::$name);

            impl Default for $name {
                fn default() -> Self {
                    Self::new(<$value>::default())
                }
            }

            impl $name {
                pub fn new(value: $value) -> Self {
                    Self(loom::sync::atomic::$name::new(value))
                }

                pub fn load(&self, order: Ordering) -> $value {
                    ordered(order, Ordering::Acquire, |order| self.0.load(order))
                }

                pub fn store(&self, value: $value, order: Ordering) {
                    ordered(order, Ordering::Release, |order| self.0.store(value, order));
                }

                pub fn swap(&self, value: $value, order: Ordering) -> $value {
                    ordered(order, Ordering::AcqRel, |order| self.0.swap(value, order))
                }
            }
        )*};
    }

    macro_rules! counters {
        ($($name:ident: $value:ty),*) => {$(
            impl $name {
                pub fn fetch_add(&self, value: $value, order: Ordering) -> $value {
                    ordered(order, Ordering::AcqRel, |order| self.0.fetch_add(value, order))
                }

                pub fn fetch_sub(&self, value: $value, order: Ordering) -> $value {
                    ordered(order, Ordering::AcqRel, |order| self.0.fetch_sub(value, order))
                }

                /// Both orders must be equal.
                pub fn compare_exchange_weak(
                    &self,
                    current: $value,
                    new: $value,
                    order: Ordering,
                    _: Ordering,
                ) -> Result<$value, $value> {
                    ordered(order, Ordering::AcqRel, |order| {
                        self.0.compare_exchange_weak(current, new, order, order)
                    })
                }
            }
        )*};
    }

    atomics!(AtomicBool: bool, AtomicU32: u32, AtomicU64: u64, AtomicUsize: usize);
    counters!(AtomicU32: u32, AtomicU64: u64, AtomicUsize: usize);
}

/// A mutex with the API of `parking_lot`.
pub struct Mutex<T>(loom::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub fn new(value: T) -> Self {
        Self(loom::sync::Mutex::new(value))
    }

    pub fn lock(&self) -> loom::sync::MutexGuard<'_, T> {
        self.0.lock().unwrap()
    }
}

impl<T: Default> Default for Mutex<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}
