//! Collectives against plain sums, and their errors when ranks fail.

use super::*;
use crate::error::{Result, bail, hint_of};
use candle_core::{DType, Tensor};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(20);

/// The test values of rank `rank`.
fn numbers(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| (i * 7 % 13) as f32 * 0.1 + rank as f32).collect()
}

/// Sums over `world_size` ranks starting with rank `first`, in rank order.
fn summed_from(first: usize, world_size: usize, len: usize) -> Vec<f32> {
    let mut sum = numbers(first, len);
    let mut add = |rank| sum.iter_mut().zip(numbers(rank, len)).for_each(|(s, x)| *s += x);
    (first + 1..first + world_size).for_each(&mut add);
    sum
}

fn summed(world_size: usize, len: usize) -> Vec<f32> {
    summed_from(0, world_size, len)
}

#[test]
fn parts_cover_everything_once() {
    for (len, n) in [(0, 3), (1, 3), (10, 3), (12, 4), (usize::MAX, 2)] {
        let parts: Vec<_> = (0..n).map(|i| part(len, i, n)).collect();
        assert!(parts[0].start == 0 && parts[n - 1].end == len);
        assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
        assert!(parts.iter().all(|part| part.len() == len / n || part.len() == len / n + 1));
    }
}

#[test]
fn collectives_equal_plain_sums_at_any_world_size() -> Result<()> {
    for world_size in 1..=4 {
        // Uneven counts, and one rank without elements.
        let counts: Vec<usize> = (0..world_size).map(|rank| 5 * (rank % 3)).collect();
        let len: usize = counts.iter().sum();
        let everywhere = launch(world_size, PATIENCE, |group| {
            let ours = group.reduce_scatter(numbers(group.rank(), len), &counts)?.wait()?;
            let all: Vec<f32> =
                group.all_gather(ours, &counts)?.wait()?.iter().flat_map(|part| part.to_vec()).collect();
            assert_eq!(all, summed(world_size, len));
            assert_eq!(group.all_reduce(numbers(group.rank(), 9)).wait()?, summed(world_size, 9));
            let flat = |values: Vec<f32>| Tensor::from_vec(values.clone(), values.len(), &Device::Cpu);
            let ours = group.reduce_scatter_tensor(&flat(numbers(group.rank(), len))?, &counts)?;
            let all = Tensor::cat(&group.all_gather_tensor(&ours, &counts)?, 0)?;
            assert_eq!(all.to_vec1::<f32>()?, summed(world_size, len));
            let halves = group.all_gather_tensor(&ours.to_dtype(DType::BF16)?, &counts)?;
            let halves = Tensor::cat(&halves, 0)?.to_vec1::<half::bf16>()?;
            assert_eq!(halves, summed(world_size, len).into_iter().map(half::bf16::from_f32).collect::<Vec<_>>());
            let sum = group.all_reduce_tensor(&flat(numbers(group.rank(), 9))?)?;
            assert_eq!(sum.to_vec1::<f32>()?, summed(world_size, 9));
            let uneven = group.gather(vec![group.rank() as u32; group.rank()])?;
            assert!(uneven.iter().enumerate().all(|(rank, values)| **values == vec![rank as u32; rank]));
            group.barrier()?;
            group.same("name", "vilg")?;
            group.sum(&[1.0, group.rank() as f64])
        })?;
        let last = world_size as f64 - 1.0;
        assert_eq!(everywhere, vec![vec![last + 1.0, last * (last + 1.0) / 2.0]; world_size]);
    }
    Ok(())
}

#[test]
fn shard_groups_scatter_within_and_sum_over_replicas() -> Result<()> {
    launch(6, PATIENCE, |group| {
        group.shard_over(2)?;
        assert_eq!((group.shard_rank(), group.in_first_replica()), (group.rank() % 2, group.rank() < 2));
        let (counts, first) = ([3, 4], group.rank() - group.rank() % 2);
        let ours = group.reduce_scatter(numbers(group.rank(), 7), &counts)?.wait()?;
        let ranges = [0..3, 3..7];
        assert_eq!(
            ours,
            (0..3).fold(vec![0.0; ours.len()], |sum, replica| {
                let theirs = summed_from(2 * replica, 2, 7);
                sum.iter().zip(&theirs[ranges[group.shard_rank()].clone()]).map(|(a, b)| a + b).collect()
            })
        );
        let all = group.all_gather(numbers(group.rank(), counts[group.shard_rank()]), &counts)?.wait()?;
        assert_eq!([&*all[0], &*all[1]], [&numbers(first, 3), &numbers(first + 1, 4)]);
        assert_eq!(group.all_reduce(numbers(group.rank(), 9)).wait()?, summed(6, 9));
        let tensor = Tensor::new(numbers(group.rank(), 7), &Device::Cpu)?;
        assert_eq!(group.reduce_scatter_tensor(&tensor, &counts)?.to_vec1::<f32>()?, ours);
        Ok(())
    })?;
    let odd = failure(3, PATIENCE, |group| group.shard_over(2));
    assert!(
        odd.contains("cannot be split into shard groups of 2 ranks") && odd.contains("train.hsdp_shard_size"),
        "{odd}"
    );
    Ok(())
}

#[test]
fn many_rounds_keep_their_order() -> Result<()> {
    let sums = launch(3, PATIENCE, |group| {
        (0..500)
            .map(|round| Ok(group.sum(&[round as f64 * (1.0 + group.rank() as f64)])?[0]))
            .collect::<Result<Vec<_>>>()
    })?;
    assert!(sums.iter().all(|sums| sums.iter().enumerate().all(|(round, sum)| *sum == 6.0 * round as f64)));
    Ok(())
}

#[test]
fn the_time_that_a_rank_waits_is_counted_and_work_beside_a_transfer_is_not() -> Result<()> {
    for overlaps in [false, true] {
        let waited = launch(2, PATIENCE, |group| {
            if overlaps {
                group.overlap()?;
            }
            if group.rank() == 1 {
                std::thread::sleep(Duration::from_millis(300));
            }
            let pending = group.all_gather(numbers(group.rank(), 2), &[2, 2])?;
            if group.rank() == 0 {
                std::thread::sleep(Duration::from_millis(600));
            }
            pending.wait()?;
            Ok(group.waited())
        })?;
        // Rank 0 waits at once without overlap, and with it works until the other has come.
        assert_eq!(waited[0] > Duration::from_millis(150), !overlaps, "{waited:?}");
        assert!(waited[1] < Duration::from_millis(150), "{waited:?}");
    }
    Ok(())
}

#[test]
fn overlapped_collectives_do_not_wait_and_keep_their_order() -> Result<()> {
    launch(3, PATIENCE, |group| {
        group.overlap()?;
        if group.rank() == 1 {
            std::thread::sleep(Duration::from_millis(400));
        }
        let begun = std::time::Instant::now();
        let counts = [2, 0, 4];
        let pending: Vec<_> =
            (0..5).map(|i| group.reduce_scatter(numbers(group.rank() + i, 6), &counts)).collect::<Result<_>>()?;
        let gathered = group.all_gather(numbers(group.rank(), counts[group.rank()]), &counts)?;
        assert!(begun.elapsed() < Duration::from_millis(200), "calls wait for the late rank");
        assert_eq!(group.sum(&[1.0])?, [3.0], "after what is under way");
        let ours = counts[..group.rank()].iter().sum::<usize>()..counts[..=group.rank()].iter().sum();
        for (i, pending) in pending.into_iter().enumerate() {
            assert_eq!(pending.wait()?, summed_from(i, 3, 6)[ours.clone()]);
        }
        let all: Vec<Vec<f32>> = gathered.wait()?.iter().map(|part| part.to_vec()).collect();
        assert_eq!(all, (0..3).map(|rank| numbers(rank, counts[rank])).collect::<Vec<_>>());
        Ok(())
    })?;
    Ok(())
}

#[test]
fn a_failing_rank_ends_collectives_in_flight_on_the_others() {
    let failed = failure(3, PATIENCE, |group| {
        group.overlap()?;
        let pending = group.all_reduce(numbers(group.rank(), 9));
        if group.rank() == 1 {
            pending.wait()?;
            bail!("disk is full");
        }
        let next = group.all_reduce(numbers(group.rank(), 9));
        pending.wait()?;
        next.wait().map(drop)
    });
    assert!(failed.contains("disk is full"), "{failed}");
}

/// The error message of a group whose ranks run `f`.
fn failure(world_size: usize, patience: Duration, f: impl Fn(&Group) -> Result<()> + Sync) -> String {
    let error = launch(world_size, patience, f).unwrap_err();
    format!("{error:#} {}", hint_of(&error).unwrap_or_default())
}

#[test]
fn a_rank_that_fails_or_panics_ends_the_group_with_its_reason() {
    let failed = failure(3, PATIENCE, |group| {
        if group.rank() == 1 {
            bail!("disk is full");
        }
        group.barrier()
    });
    assert!(failed.contains("disk is full"), "{failed}");
    let panicked = failure(3, PATIENCE, |group| {
        group.barrier()?;
        assert!(group.rank() != 2, "on purpose");
        group.barrier()
    });
    assert!(panicked.contains("rank 2 panicked: on purpose"), "{panicked}");
}

#[test]
fn different_collectives_are_an_error_that_names_both() {
    let op = failure(2, PATIENCE, |group| {
        group.begin_step(7);
        if group.rank() == 0 { group.barrier() } else { group.sum(&[1.0]).map(drop) }
    });
    let both = ["rank 0 barrier of 0 elements in step 7", "rank 1 sum of 1 elements in step 7"];
    assert!(both.iter().all(|part| op.contains(part)), "{op}");
    let length = failure(2, PATIENCE, |group| group.all_reduce(vec![0.0; 4 + group.rank()]).wait().map(drop));
    assert!(length.contains("all_reduce of 4 elements") && length.contains("all_reduce of 5 elements"), "{length}");
    let step = failure(2, PATIENCE, |group| {
        group.begin_step(group.rank() as u64);
        group.barrier()
    });
    assert!(step.contains("in step 0") && step.contains("in step 1"), "{step}");
    for (odd, usual) in [(2, 0), (0, 1)] {
        let text = failure(3, PATIENCE, |group| {
            group.same("configuration", if group.rank() == odd { "a = 1\nb = 3" } else { "a = 1\nb = 2" })
        });
        let wanted = format!("rank {odd} has another configuration than rank {usual}: `b = 3` instead of `b = 2`");
        assert!(text.contains(&wanted), "{text}");
    }
    let counts = failure(2, PATIENCE, |group| group.all_gather(vec![0.0; 3], &[2, 3]).map(drop));
    assert!(counts.contains("3 elements instead of 2"), "{counts}");
}

#[test]
fn waiting_for_a_rank_that_is_done_is_an_error_at_once() {
    let begun = std::time::Instant::now();
    let gone = failure(3, PATIENCE, |group| {
        group.barrier()?;
        if group.rank() == 0 { Ok(()) } else { group.barrier() }
    });
    assert!(gone.contains("rank 0 is done, but rank") && gone.contains("waits for it at barrier"), "{gone}");
    assert!(begun.elapsed() < PATIENCE / 2);
}

#[test]
fn a_rank_that_times_out_is_named_with_its_last_call() {
    let late = failure(3, Duration::from_millis(300), |group| {
        group.begin_step(4);
        group.barrier()?;
        if group.rank() == 1 {
            std::thread::sleep(Duration::from_millis(900));
        }
        group.sum(&[0.0]).map(drop)
    });
    for part in ["waited 0.3 s at sum", "rank 1 (last seen at barrier of 0 elements in step 4)", "train.rank_timeout"] {
        assert!(late.contains(part), "{late}");
    }
}

#[test]
fn a_hanging_collective_thread_is_an_error_for_its_waiter() {
    let hung = failure(2, Duration::from_millis(300), |group| {
        group.overlap()?;
        let sleep = |seconds| {
            std::thread::sleep(Duration::from_secs(seconds));
            Ok(())
        };
        let pending = group.start(move |_| sleep(2));
        if group.rank() == 0 { pending.wait() } else { sleep(1) }
    });
    assert!(hung.contains("rank 0: the collective thread has made no progress for 0.6 s"), "{hung}");
}
