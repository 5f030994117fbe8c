//! Rows as Parquet.
//!
//! Written through the columns' own writers and read through the record reader: Arrow would bring ten crates for what
//! two functions do here. Format: Apache Parquet, `LogicalTypes.md` (lists of three levels).

use std::io::Write;
use std::sync::Arc;

use parquet::basic::{Compression, ZstdLevel};
use parquet::data_type::{BoolType, ByteArray, ByteArrayType, DataType, DoubleType, Int32Type};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{ChunkReader, FileReader, SerializedFileReader};
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row as Record};
use parquet::schema::parser::parse_message_type;
use serde_json::{Map, Value};

use super::flat::Flat;
use super::{FileError, Records};
use crate::row::Row;

/// Rows and bytes after which a row group is written: what is in memory at once.
const GROUP_ROWS_MAX: usize = 1_000;
const GROUP_BYTES_MAX: usize = 64 << 20;

const SCHEMA: &str = "message row {
    required binary id (UTF8);
    required binary timestamp (UTF8);
    required binary model (UTF8);
    required binary messages (UTF8);
    required binary tools (UTF8);
    required boolean truncated;
    optional binary original_id (UTF8);
    optional int32 truncation_point (UINT_32);
    optional binary task_id (UTF8);
    optional binary task_kind (UTF8);
    required binary split (UTF8);
    optional double reward;
    required group trained_turns (LIST) { repeated group list { required int32 element (UINT_32); } }
    optional group ids (LIST) { repeated group list { required int32 element (UINT_32); } }
    optional group supervised (LIST) { repeated group list { required group element {
        required int32 start (UINT_32);
        required int32 end (UINT_32);
    } } }
}";

/// Writes rows in row groups of bounded size.
pub struct ParquetWriter<W: Write + Send> {
    file: SerializedFileWriter<W>,
    rows: Vec<Flat>,
    bytes: usize,
}

impl<W: Write + Send> std::fmt::Debug for ParquetWriter<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ParquetWriter").finish_non_exhaustive()
    }
}

impl From<ParquetError> for FileError {
    fn from(error: ParquetError) -> Self {
        Self::Write(error.into())
    }
}

impl<W: Write + Send> ParquetWriter<W> {
    /// Begins a file.
    ///
    /// # Errors
    /// `out` fails.
    pub fn new(out: W) -> Result<Self, FileError> {
        let schema = Arc::new(parse_message_type(SCHEMA)?);
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::try_new(3)?))
            .set_created_by("espalier".to_owned())
            .build();
        Ok(Self {
            file: SerializedFileWriter::new(out, schema, Arc::new(properties))?,
            rows: Vec::new(),
            bytes: 0,
        })
    }

    /// Writes a row.
    ///
    /// # Errors
    /// `out` fails.
    pub fn write(&mut self, row: &Row) -> Result<(), FileError> {
        let flat = Flat::of(row);
        self.bytes += flat.bytes();
        self.rows.push(flat);
        if self.rows.len() >= GROUP_ROWS_MAX || self.bytes >= GROUP_BYTES_MAX {
            self.flush()?;
        }
        Ok(())
    }

    /// Ends the file.
    ///
    /// # Errors
    /// `out` fails.
    pub fn finish(mut self) -> Result<W, FileError> {
        self.flush()?;
        Ok(self.file.into_inner()?)
    }

    fn flush(&mut self) -> Result<(), FileError> {
        let rows = std::mem::take(&mut self.rows);
        self.bytes = 0;
        if !rows.is_empty() {
            let mut group = Group {
                writer: self.file.next_row_group()?,
                rows,
            };
            group.write()?;
            group.writer.close()?;
        }
        Ok(())
    }
}

/// One row group, written column by column in the order of [`SCHEMA`].
struct Group<'a, W: Write + Send> {
    writer: SerializedRowGroupWriter<'a, W>,
    rows: Vec<Flat>,
}

impl<W: Write + Send> Group<'_, W> {
    fn write(&mut self) -> Result<(), ParquetError> {
        self.text(|row| &row.id)?;
        self.text(|row| &row.timestamp)?;
        self.text(|row| &row.model)?;
        self.text(|row| &row.messages)?;
        self.text(|row| &row.tools)?;
        self.required::<BoolType>(|row| row.truncated)?;
        self.optional::<ByteArrayType>(|row| row.original_id.as_deref().map(ByteArray::from))?;
        self.optional::<Int32Type>(|row| row.truncation_point.map(u32::cast_signed))?;
        self.optional::<ByteArrayType>(|row| row.task_id.as_deref().map(ByteArray::from))?;
        self.optional::<ByteArrayType>(|row| row.task_kind.as_deref().map(ByteArray::from))?;
        self.required::<ByteArrayType>(|row| row.split.as_str().into())?;
        self.optional::<DoubleType>(|row| row.reward)?;
        self.list(0, |row| Some(row.trained_turns.clone()))?;
        self.list(1, |row| row.ids.clone())?;
        let spans = |row: &Flat, end: fn(&std::ops::Range<u32>) -> u32| {
            let spans = row.supervised.as_ref()?;
            Some(spans.iter().map(end).collect())
        };
        self.list(1, |row| spans(row, |span| span.start))?;
        self.list(1, |row| spans(row, |span| span.end))
    }

    fn text(&mut self, of: impl Fn(&Flat) -> &str) -> Result<(), ParquetError> {
        self.required::<ByteArrayType>(|row| of(row).into())
    }

    fn required<T: DataType>(&mut self, of: impl Fn(&Flat) -> T::T) -> Result<(), ParquetError> {
        let values: Vec<T::T> = self.rows.iter().map(of).collect();
        self.column::<T>(&values, None, None)
    }

    fn optional<T: DataType>(
        &mut self,
        of: impl Fn(&Flat) -> Option<T::T>,
    ) -> Result<(), ParquetError> {
        let found: Vec<Option<T::T>> = self.rows.iter().map(of).collect();
        let defined: Vec<i16> = found.iter().map(|v| i16::from(v.is_some())).collect();
        let values: Vec<T::T> = found.into_iter().flatten().collect();
        self.column::<T>(&values, Some(&defined), None)
    }

    /// A list of numbers, or of one field of a struct. `optional` is 1 where the list itself may be absent, otherwise 0:
    /// levels count from the outside what is there.
    fn list(
        &mut self,
        optional: i16,
        of: impl Fn(&Flat) -> Option<Vec<u32>>,
    ) -> Result<(), ParquetError> {
        let (mut values, mut defined, mut repeated) = (Vec::new(), Vec::new(), Vec::new());
        for list in self.rows.iter().map(of) {
            let Some(list) = list.as_deref().filter(|list| !list.is_empty()) else {
                defined.push(if list.is_some() { optional } else { 0 });
                repeated.push(0);
                continue;
            };
            defined.extend(list.iter().map(|_| optional + 1));
            repeated.extend((0..list.len()).map(|n| i16::from(n > 0)));
            values.extend(list.iter().map(|number| number.cast_signed()));
        }
        self.column::<Int32Type>(&values, Some(&defined), Some(&repeated))
    }

    fn column<T: DataType>(
        &mut self,
        values: &[T::T],
        defined: Option<&[i16]>,
        repeated: Option<&[i16]>,
    ) -> Result<(), ParquetError> {
        let missing = || ParquetError::General("fewer columns than the schema has".to_owned());
        let mut column = self.writer.next_column()?.ok_or_else(missing)?;
        column.typed::<T>().write_batch(values, defined, repeated)?;
        column.close()
    }
}

/// The records of a Parquet file, whoever wrote it: structs become objects without their null fields, which Arrow
/// fills in for whatever a row has not.
///
/// # Errors
/// The file is not Parquet.
pub fn parquet_records<R: ChunkReader + 'static>(
    file: impl Into<String>,
    from: R,
) -> Result<Records, FileError> {
    let file = file.into();
    let failed = |row, error: ParquetError| FileError::Read {
        file: file.clone(),
        row,
        source: error.into(),
    };
    let reader = SerializedFileReader::new(from).map_err(|error| failed(0, error))?;
    let records = RowIter::from_file_into(Box::new(reader) as Box<dyn FileReader>);
    Ok(Box::new(records.enumerate().map(move |(row, record)| {
        let record = record.map_err(|source| FileError::Read {
            file: file.clone(),
            row,
            source: source.into(),
        })?;
        Ok(object(&record))
    })))
}

fn object(record: &Record) -> Value {
    let fields = record.get_column_iter();
    let fields = fields.filter(|(_, field)| !matches!(field, Field::Null));
    let fields = fields.map(|(name, field)| (name.clone(), value(field)));
    Value::Object(fields.collect())
}

fn value(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(value) => Value::from(*value),
        Field::Byte(value) => Value::from(*value),
        Field::Short(value) => Value::from(*value),
        Field::Int(value) | Field::Date(value) | Field::TimeMillis(value) => Value::from(*value),
        Field::Long(value)
        | Field::TimeMicros(value)
        | Field::TimestampMillis(value)
        | Field::TimestampMicros(value) => Value::from(*value),
        Field::UByte(value) => Value::from(*value),
        Field::UShort(value) => Value::from(*value),
        Field::UInt(value) => Value::from(*value),
        Field::ULong(value) => Value::from(*value),
        Field::Float(value) => Value::from(*value),
        Field::Double(value) => Value::from(*value),
        Field::Str(text) => Value::from(text.as_str()),
        Field::Group(record) => object(record),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        Field::MapInternal(map) => {
            let entries = map.entries().iter();
            let entries = entries.map(|(key, field)| (text(key), value(field)));
            Value::Object(entries.collect::<Map<_, _>>())
        }
        // No chat holds them.
        Field::Float16(_) | Field::Decimal(_) | Field::Bytes(_) => Value::from(field.to_string()),
    }
}

fn text(key: &Field) -> String {
    match key {
        Field::Str(text) => text.clone(),
        other => other.to_string(),
    }
}
