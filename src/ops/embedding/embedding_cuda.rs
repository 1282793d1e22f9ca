//! Rows of a table by the kernels of embedding.cu.

use crate::ops::cuda::{Call, Output, run};
use candle_core::{DType, Result, Tensor, bail};

const THREADS: usize = 256;

/// Columns of a thread in the backward pass.
const COLUMNS: usize = 4;

/// `table (rows, hidden)`, `ids (n)` u32 → `(n, hidden)`, for a table that [`takes`](crate::ops::cuda::takes) accepts.
pub fn embedding(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let ((rows, hidden), n, dtype) = (table.dims2()?, ids.dims1()?, table.dtype());
    if ids.dtype() != DType::U32 {
        bail!("embedding: ids are {:?} and not u32", ids.dtype());
    }
    let (table, ids) = (table.contiguous()?, ids.contiguous()?);
    let [y] = run(&[&table, &ids], [Output::new((n, hidden), dtype)], &|from, to| {
        let call = Call::new("embedding_forward", &[dtype], [n, hidden.div_ceil(THREADS)], THREADS);
        vec![call.with(from[0]).with(from[1]).with(to[0]).with(rows).with(hidden)]
    })?;
    y.differentiable("embedding", &[&table], move |_, _, dy| {
        let [dtable] = run(&[&ids, dy], [Output::new((rows, hidden), dtype)], &|from, to| {
            let call = Call::new("embedding_backward", &[dtype], [rows, hidden.div_ceil(COLUMNS * THREADS)], THREADS);
            vec![call.with(from[0]).with(from[1]).with(to[0]).with(n).with(hidden)]
        })?;
        Ok(vec![dtable.tensor()])
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        error::Result,
        ops::{cuda::emulator, embedding::by, testing::*},
        runtime::Kernels,
    };
    use candle_core::Device;

    #[test]
    fn equals_stock_ops() -> Result<()> {
        if !emulator::available() {
            return Ok(());
        }
        // Rows that no id names, that several name, and more ids and columns than a block has threads.
        for (rows, hidden, n) in [(1, 1, 1), (9, 5, 40), (4, 1030, 3), (3, 2, 700)] {
            let ids: Vec<u32> = (0..n as u32).map(|i| i * i % 7 % rows as u32).collect();
            let ids = Tensor::from_vec(ids, (1, n), &Device::Cpu)?;
            let table = |dtype| [normal("table", &[rows, hidden], dtype)];
            let (fused, stock) =
                (|v: &[Tensor]| by(Kernels::Fused, &v[0], &ids), |v: &[Tensor]| by(Kernels::Stock, &v[0], &ids));
            assert_same(&table(DType::F32), 1e-6, &fused, &stock)?;
            let wide = |v: &[Tensor]| Ok(stock(&[v[0].to_dtype(DType::F32)?])?.to_dtype(DType::BF16)?);
            assert_same(&table(DType::BF16), 1e-2, &fused, &wide)?;
        }
        Ok(())
    }

    #[test]
    fn an_id_outside_the_table_gives_no_numbers() -> Result<()> {
        if !emulator::available() {
            return Ok(());
        }
        let rows = embedding(&normal("table", &[3, 2], DType::F32), &Tensor::new(&[2u32, 3], &Device::Cpu)?)?;
        let rows = values(&rows);
        assert!(rows[..2].iter().all(|x| x.is_finite()) && rows[2..].iter().all(|x| x.is_nan()), "{rows:?}");
        Ok(())
    }
}
