//! The spread of a figure over the rounds.

/// The spread of a figure over the rounds.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    /// The median.
    pub median: f64,
    /// The lowest value.
    pub min: f64,
    /// The highest value.
    pub max: f64,
}

impl Spread {
    /// The spread of `values`, which must not be empty.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let last = values.len() - 1;
        Self {
            median: f64::midpoint(values[last / 2], values[last.div_ceil(2)]),
            min: values[0],
            max: values[last],
        }
    }
}
