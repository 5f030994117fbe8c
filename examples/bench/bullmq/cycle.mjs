// BullMQ's part of `espalier bench redis`: all jobs in by addBulk, all done by one worker process.
// Usage: REDIS_URL=redis://… node cycle.mjs JOBS; prints one line of JSON.
// `sequential` adds everything first, `overlapped` adds while the worker works; the queue is a new one each time.
import { fork } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';
import { Queue, Worker } from 'bullmq';

const BULK = 1000;
const CONCURRENCY = 100;
const PAYLOAD = 'x'.repeat(300);

const address = new URL(process.env.REDIS_URL);
const connection = { host: address.hostname, port: Number(address.port) };
const [command, ...rest] = process.argv.slice(2);
if (command === 'work') {
  work(rest[0], Number(rest[1]));
} else {
  await measure(Number(command));
}

// Does nothing with each job but to count it, and reports when all have come and none runs any more.
function work(queue, jobs) {
  const times = new Uint32Array(jobs);
  let done = 0;
  const worker = new Worker(queue, async (job) => { times[job.data.n] += 1; }, { connection, concurrency: CONCURRENCY });
  worker.on('completed', () => {
    done += 1;
    if (done === jobs) process.send({ once: times.reduce((sum, n) => sum + (n === 1), 0) });
  });
  worker.on('ready', () => process.send({ ready: true }));
  process.on('message', async () => { await worker.close(); process.exit(0); });
}

async function start(queue, jobs) {
  const child = fork(fileURLToPath(import.meta.url), ['work', queue, String(jobs)]);
  const says = (key) => new Promise((resolve, reject) => {
    child.on('message', (message) => { if (key in message) resolve(message[key]); });
    child.on('exit', (code) => reject(new Error(`the worker ended with ${code}`)));
  });
  const [ready, once] = [says('ready'), says('once')];
  once.catch(() => {});
  await ready;
  return { once, stop: () => new Promise((resolve) => { child.on('exit', resolve); child.send('stop'); }) };
}

async function add(queue, jobs) {
  for (let from = 0; from < jobs; from += BULK) {
    const many = Array.from({ length: Math.min(BULK, jobs - from) }, (_, n) => ({
      name: 'job', data: { n: from + n, payload: PAYLOAD },
    }));
    await queue.addBulk(many);
  }
}

async function cycle(name, jobs, overlapped) {
  const queue = new Queue(name, { connection });
  await queue.waitUntilReady();
  let worker = overlapped ? await start(name, jobs) : null;
  const began = performance.now();
  await add(queue, jobs);
  const added = performance.now();
  // The start of the worker's process is nobody's figure.
  worker ??= await start(name, jobs);
  const working = overlapped ? added : performance.now();
  const once = await worker.once;
  const ended = performance.now();
  const counts = await queue.getJobCounts('completed', 'waiting', 'active', 'failed', 'delayed');
  await worker.stop();
  await queue.obliterate({ force: true });
  await queue.close();
  const add_s = (added - began) / 1000;
  const process_s = (ended - working) / 1000;
  return {
    add_jobs_per_s: jobs / add_s,
    process_jobs_per_s: overlapped ? null : jobs / process_s,
    cycle_jobs_per_s: jobs / (add_s + process_s),
    done_once: once,
    completed: counts.completed,
    left: counts.waiting + counts.active + counts.failed + counts.delayed,
  };
}

async function measure(jobs) {
  const main = createRequire(import.meta.url).resolve('bullmq');
  const manifest = main.slice(0, main.lastIndexOf('/bullmq/')) + '/bullmq/package.json';
  const version = JSON.parse(readFileSync(manifest)).version;
  const sequential = await cycle('sequential', jobs, false);
  const overlapped = await cycle('overlapped', jobs, true);
  console.log(JSON.stringify({ system: `BullMQ ${version}`, jobs, cycles: { sequential, overlapped } }));
}
